"""Wrong, truncated, mismatched and malicious checkpoints: a clear error, no code run, nothing loaded."""

import inspect
import json
import os
import pickle
import re
import sys

import pytest
import torch
from model_inputs import fast_model, reference_model

from mamba_fast import CheckpointError, Mamba, MambaLMHeadModel
from mamba_fast.checkpoint_config import _OPTIONS

EMBEDDING = "backbone.embedding.weight"


class Evil:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that loads."""
    path = tmp_path / "model"
    fast_model(reference_model()).save_pretrained(path)
    MambaLMHeadModel.from_pretrained(path)
    return path


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def change_weights(folder, change):
    path = folder / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


def refused(folder, *parts):
    """from_pretrained raises one CheckpointError that says all of `parts`; returns it."""
    with pytest.raises(CheckpointError) as caught:
        MambaLMHeadModel.from_pretrained(folder)
    for part in parts:
        assert str(part) in str(caught.value)
    return caught.value


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["value", "everything", "shard"])
def test_code_in_a_pickle_is_not_run(folder, tmp_path, zipped, place):
    path, trace = folder / "pytorch_model.bin", tmp_path / "it ran"
    weights = torch.load(path, weights_only=True)
    held = Evil(trace) if place == "everything" else weights | {EMBEDDING: Evil(trace)}
    if place == "shard":
        path.unlink()
        path = folder / "pytorch_model-00001-of-00001.bin"
        index = {"weight_map": dict.fromkeys(weights, path.name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    refused(folder, path, "refused: it names", "mkdir", "nothing of it was run")
    assert not trace.exists()


def test_a_bare_pickle_is_not_run(folder, tmp_path):
    trace = tmp_path / "it ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({EMBEDDING: Evil(trace)}))
    refused(folder, "pytorch_model.bin", "refused")
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0, 1, 10, 1000, -1, -100])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_truncated_file(folder, kept, form):
    path = folder / "pytorch_model.bin"
    if form == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        path.unlink()
        fast_model(reference_model()).save_pretrained(folder, format="hf")
        path = folder / "model.safetensors"
    elif form == "legacy":
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, path, "truncated")


SOMETHING_ELSE = {
    "tensor": torch.zeros(3),
    "list": [torch.zeros(3)],
    "nested": {"model": {"a": torch.zeros(3)}},
    "number": {3: torch.zeros(3)},
}


@pytest.mark.parametrize("held", SOMETHING_ELSE.values(), ids=SOMETHING_ELSE)
def test_something_else_than_a_dict_of_tensors(folder, held):
    torch.save(held, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "expected a")


def test_every_wrong_key_is_named(folder):
    def change(weights):
        del weights["backbone.layers.1.mixer.D"]
        weights["backbone.layers.1.mixer.A_log"] = torch.zeros(20, 4)
        weights["backbone.extra"] = torch.zeros(2)

    change_weights(folder, change)
    refused(
        folder,
        f"{folder}: backbone.layers.1.mixer.D: expected shape (20,), found no such key",
        f"{folder}/pytorch_model.bin: backbone.layers.1.mixer.A_log: expected shape (20, 5), got (20, 4)",
        f"{folder}/pytorch_model.bin: backbone.extra: no such parameter (shape (2,))",
    )


def test_many_wrong_keys_are_counted(folder):
    change_config(folder, d_model=12)
    message = str(refused(folder, "expected shape (32, 12), got (32, 10)"))
    assert message.count("\n") == 6
    assert re.search(r"and \d+ more$", message)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("n_layer", 3, "n_layer: 3 layers, but the weights hold 2"),
        ("n_layer", 10**7, "n_layer: 10000000 layers, but the weights hold 2"),
        ("n_layer", 0, "n_layer: expected a whole number from 1 to 2**24, got 0"),
        ("d_model", 10**9, "d_model: expected a whole number from 1 to 2**24, got 1000000000"),
        ("d_model", "10", "d_model: expected int, got '10'"),
        ("rms_norm", 1, "rms_norm: expected bool, got 1"),
        ("rope", 1, "rope: not a field of MambaConfig"),
        ("ssm_cfg", {"layer": "Mamba2"}, "ssm_cfg: expected layer 'Mamba1', got 'Mamba2'"),
        ("ssm_cfg", {"headdim": 64}, "ssm_cfg: headdim: not a keyword of Mamba"),
        ("ssm_cfg", {"device": "cuda"}, "ssm_cfg: device: not a keyword of Mamba"),
        ("ssm_cfg", {"d_state": "16"}, "ssm_cfg: d_state: expected a whole number from 1 to 2**24, got '16'"),
        ("ssm_cfg", {"d_conv": 5}, "ssm_cfg: d_conv: expected 2, 3 or 4, got 5"),
        ("ssm_cfg", {"dt_rank": None}, "ssm_cfg: dt_rank: expected 'auto' or a whole number from 1 to 2**24"),
        ("ssm_cfg", {"dt_min": "a"}, "ssm_cfg: dt_min: expected a positive number, got 'a'"),
        ("ssm_cfg", {"dt_max": 0}, "ssm_cfg: dt_max: expected a positive number, got 0"),
        (
            "ssm_cfg",
            {"dt_scale": float("nan")},
            "dt_scale: expected a number, not negative, got nan",
        ),
        ("ssm_cfg", {"dt_init": "zero"}, "ssm_cfg: dt_init: expected 'random' or 'constant', got 'zero'"),
        ("ssm_cfg", {"bias": "no"}, "ssm_cfg: bias: expected true or false, got 'no'"),
        ("ssm_cfg", {"expand": None}, "ssm_cfg: expand: expected a positive number, got None"),
        (
            "ssm_cfg",
            {"expand": 0.01},
            "expand * d_model a whole number from 1 to 2**24, got 0",
        ),
        ("attn_layer_idx", [1], "attn_layer_idx: attention is not supported, got [1]"),
        ("model_type", "mamba2", "model_type: expected 'mamba', got 'mamba2'"),
        ("model_type", "falcon_mamba", "model_type: expected 'mamba', got 'falcon_mamba'"),
    ],
)
def test_a_wrong_config(folder, key, value, said):
    change_config(folder, **{key: value})
    refused(folder, folder / "config.json", said)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("hidden_act", "relu", "hidden_act: expected 'silu', got 'relu'"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon: expected 1e-05, got 1e-06"),
        ("intermediate_size", 30, "intermediate_size: expected expand * hidden_size = 2 * 10, got 30"),
        ("num_hidden_layers", True, "num_hidden_layers: expected a whole number from 1 to 2**24, got True"),
        ("conv_kernel", 5, "conv_kernel: expected 2, 3 or 4, got 5"),
        ("time_step_min", None, "time_step_min: expected a positive number, got None"),
        ("time_step_init_scheme", 3, "time_step_init_scheme: expected 'random' or 'constant', got 3"),
        ("expand", float("inf"), "expand: expected a positive number, got inf"),
        ("use_bias", "no", "use_bias: expected true or false, got 'no'"),
    ],
)
def test_a_wrong_config_of_transformers(folder, key, value, said):
    change_config(
        folder, **({"model_type": "mamba", "hidden_size": 10, "num_hidden_layers": 2} | {key: value})
    )
    refused(folder, folder / "config.json", said)


def test_every_keyword_of_the_block_can_stand_in_a_config():
    keywords = inspect.signature(Mamba).parameters.keys() - {"d_model", "layer_idx", "device", "dtype"}
    assert set(_OPTIONS) == keywords


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"d_model": NaN', "\x00"], ids=range(6))
def test_a_config_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text, "utf-8")
    refused(folder, folder / "config.json", "JSON")


def test_missing_files(folder, tmp_path):
    (folder / "pytorch_model.bin").unlink()
    refused(folder, folder, "expected a file model.safetensors or")
    (folder / "config.json").unlink()
    refused(folder, folder, "expected a file config.json, found none")


@pytest.mark.parametrize(
    "file", ["../secret.bin", "/etc/passwd", "a/b.bin", "x.safetensors", "..", 3, None, ""]
)
def test_an_index_points_nowhere_else(folder, tmp_path, file):
    (folder / "pytorch_model.bin").rename(tmp_path / "secret.bin")
    index = {"weight_map": {EMBEDDING: file}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    refused(
        folder,
        "pytorch_model.bin.index.json",
        f"{EMBEDDING}: expected a *.bin file of this folder, got {file!r}",
    )


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, {"weight_map": []}])
def test_an_index_without_a_map(folder, index):
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    refused(folder, "pytorch_model.bin.index.json")


def test_shards_and_index_agree(folder):
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").rename(folder / "one.bin")
    index = folder / "pytorch_model.bin.index.json"
    listed = dict.fromkeys(weights, "one.bin")
    index.write_text(json.dumps({"weight_map": {k: v for k, v in listed.items() if k != EMBEDDING}}), "utf-8")
    refused(folder, "one.bin", EMBEDDING, "the index does not list it")
    index.write_text(json.dumps({"weight_map": listed | {"more": "one.bin"}}), "utf-8")
    refused(folder, "one.bin: more: it is not there")
    index.write_text(json.dumps({"weight_map": listed | {"more": "two.bin"}}), "utf-8")
    refused(folder, "expected a file two.bin, found none")


def test_an_embedding_under_both_names(folder):
    change_weights(folder, lambda weights: weights.update({"backbone.embeddings.weight": torch.ones(3, 3)}))
    refused(folder, "backbone.embeddings.weight: no such parameter (shape (3, 3))")


def test_a_head_that_is_not_the_embedding(folder):
    def change(weights):
        weights["lm_head.weight"] = weights["lm_head.weight"] + 1

    change_weights(folder, change)
    refused(folder, "lm_head.weight: differs from backbone.embedding.weight, but the config ties them")
    change_config(folder, tie_embeddings=False)
    assert not MambaLMHeadModel.from_pretrained(folder).config.tie_embeddings


@pytest.mark.parametrize(
    "value", [torch.zeros(20, dtype=torch.int64), torch.zeros(20).to_sparse()], ids=["int", "sparse"]
)
def test_a_tensor_of_another_kind(folder, value):
    change_weights(folder, lambda weights: weights.update({"backbone.layers.0.mixer.D": value}))
    refused(folder, "pytorch_model.bin: backbone.layers.0.mixer.D: expected a")


def test_everything_is_checked_before_anything_is_read(folder, monkeypatch):
    """A missing key is seen from the names alone: no tensor is copied, no parameter filled."""
    change_weights(folder, lambda weights: weights.pop("backbone.norm_f.weight"))
    done = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda v, other: done.append(v) or v)
    monkeypatch.setattr(MambaLMHeadModel, "load_state_dict", lambda self, *args, **kwargs: done.append(self))
    refused(folder, "backbone.norm_f.weight")
    assert all(v.is_meta for v in done)


@pytest.mark.parametrize("library", ["huggingface_hub", "safetensors"])
def test_what_to_install_is_said(folder, monkeypatch, library):
    name = folder
    if library == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        (folder / "pytorch_model.bin").unlink()
        fast_model(reference_model()).save_pretrained(folder, format="hf")
    else:
        name = "state-spaces/mamba-130m"
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}: pip install 'mamba-fast\[hf\]'"):
        MambaLMHeadModel.from_pretrained(name)
