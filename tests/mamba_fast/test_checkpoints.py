"""Load and save: the published form and that of transformers, whole and in shards; loaded there as well."""

import json

import pytest
import torch
from model_inputs import VOCAB, fast_model, reference_model, token_ids

from mamba_fast import MambaConfig, MambaLMHeadModel, check_init
from mamba_fast.checkpoints import load_config_hf, load_state_dict_hf
from mamba_ref.checks import bound, check

EMBEDDING, HF_EMBEDDING, HEAD = "backbone.embedding.weight", "backbone.embeddings.weight", "lm_head.weight"


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


@pytest.fixture
def transformers(monkeypatch):
    found = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(found.utils.logging, "_tqdm_active", False)
    return found


def write_published(folder, reference, **changes):
    """What the published package writes: torch.save of the state_dict, and the fields of its config."""
    folder.mkdir(exist_ok=True)
    config = {
        "d_model": 10, "n_layer": 2, "vocab_size": VOCAB, "ssm_cfg": {"d_state": 5, "d_conv": 3},
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    } | changes  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    torch.save(reference.float().state_dict(), folder / "pytorch_model.bin")
    return folder


def shard(folder, save, suffix, weights):
    """`weights` in two files and an index."""
    names = [f"model-{i:05}-of-00002.{suffix}" for i in (1, 2)]
    parts = [dict(list(weights.items())[k::2]) for k in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        save(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    whole = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{whole}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8"
    )


def same(model, reference):
    """Every parameter is the reference's, bit for bit, and the head is tied."""
    weights = reference.float().state_dict()
    assert list(model.state_dict()) == list(weights)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    return True


def test_the_published_form(tmp_path):
    reference = reference_model(1)
    model = MambaLMHeadModel.from_pretrained(write_published(tmp_path, reference))
    assert same(model, reference)
    assert model.config == MambaConfig(
        d_model=10, n_layer=2, vocab_size=VOCAB, ssm_cfg={"d_state": 5, "d_conv": 3}
    )
    assert model.backbone.layers[0].mixer.A_log._no_weight_decay


def test_nothing_of_the_file_is_kept(tmp_path):
    """The model does not read its weights from a file that may change under it."""
    reference = reference_model(2)
    model = MambaLMHeadModel.from_pretrained(write_published(tmp_path, reference))
    path = tmp_path / "pytorch_model.bin"
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert same(model, reference)


@pytest.mark.parametrize("legacy", [False, True])
def test_shards_of_torch_save(tmp_path, legacy):
    reference = reference_model(3)
    write_published(tmp_path, reference)
    (tmp_path / "pytorch_model.bin").unlink()
    weights = {k: v for k, v in reference.float().state_dict().items() if k != HEAD}

    def save(part, path):
        torch.save(part, path, _use_new_zipfile_serialization=not legacy)

    shard(tmp_path, save, "bin", weights)
    assert same(MambaLMHeadModel.from_pretrained(tmp_path), reference)


def test_shards_of_safetensors(tmp_path, safetensors):
    reference = reference_model(4)
    write_published(tmp_path, reference)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read: safetensors come first")
    weights = {
        k.replace("embedding", "embeddings"): v
        for k, v in reference.float().state_dict().items()
        if k != HEAD
    }
    shard(tmp_path, lambda part, path: safetensors.save_file(part, path), "safetensors", weights)
    assert same(MambaLMHeadModel.from_pretrained(str(tmp_path)), reference)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_types(tmp_path, dtype, stored):
    reference = reference_model(5)
    write_published(tmp_path, reference)
    weights = {k: v.to(stored) for k, v in reference.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = MambaLMHeadModel.from_pretrained(tmp_path, device="cpu", dtype=dtype)
    for key, value in model.state_dict().items():
        wanted = torch.float32 if dtype is None or key.endswith(("A_log", ".D")) else dtype
        assert value.dtype == wanted, key
        assert torch.equal(value, weights[key].to(wanted)), key


@pytest.mark.gpu
def test_device(tmp_path):
    reference = reference_model(6)
    model = MambaLMHeadModel.from_pretrained(write_published(tmp_path, reference), device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert same(model.cpu(), reference)


@pytest.mark.parametrize("format", ["published", "hf"])
@pytest.mark.parametrize("tie", [True, False])
def test_what_is_saved_comes_back(tmp_path, format, tie, safetensors):
    torch.manual_seed(7)
    options = dict(d_state=3, dt_rank=4, expand=3, conv_bias=False, bias=True, dt_max=0.5)
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=19, ssm_cfg=options, tie_embeddings=tie)
    model = MambaLMHeadModel(config, dtype=torch.bfloat16)
    for _ in range(2):  # also over itself
        model.save_pretrained(tmp_path / "new" / "folder", format=format)
    back = MambaLMHeadModel.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert {k: v.dtype for k, v in back.state_dict().items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    assert (back.lm_head.weight is back.backbone.embedding.weight) == tie
    assert back.config.ssm_cfg == options
    assert back.config.vocab_size == (24 if format == "hf" else 19)  # transformers knows no padding
    assert check_init(back) == []
    assert not list((tmp_path / "new" / "folder").glob(".*"))


def test_what_the_published_package_reads(tmp_path):
    """Its loader is torch.load and MambaConfig(**json): keys, shapes and fields are its own."""
    reference = reference_model(8)
    fast_model(reference).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    wanted = reference.float().state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in wanted.items()}
    assert weights[HEAD].data_ptr() == weights[EMBEDDING].data_ptr()  # stored once
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert list(config) == [
        "d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg",
        "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings",
    ]  # fmt: skip


@torch.no_grad()
def test_transformers_reads_ours(tmp_path, transformers, safetensors):
    """Its MambaForCausalLM takes every weight; logits and greedy text are the reference's."""
    reference, ids = reference_model(9), token_ids(10, 2, 9)
    fast_model(reference).save_pretrained(tmp_path, format="hf")
    theirs, info = transformers.MambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    single = reference_model(9).float()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, single.state_dict()[key.replace("embeddings", "embedding")]), key
    want, plain = reference(ids), single(ids)
    check("transformers", theirs(ids).logits, want, bound(plain, want))
    text = theirs.generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=None, suppress_tokens=list(range(27, 32))
    )
    assert text.tolist() == reference.greedy(ids, 8).tolist()


@torch.no_grad()
def test_ours_reads_transformers(tmp_path, transformers, safetensors):
    """Whole and in shards; a vocabulary that is no multiple of 8 stays as it is."""
    torch.manual_seed(11)
    config = transformers.MambaConfig(
        vocab_size=29, hidden_size=12, num_hidden_layers=2, state_size=5, conv_kernel=3, time_step_max=0.5,
        use_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    theirs, ids = transformers.MambaForCausalLM(config).eval(), token_ids(12, 2, 9)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 2
    plain, want = theirs(ids).logits, theirs.double()(ids).logits
    for folder in ("whole", "shards"):
        ours = MambaLMHeadModel.from_pretrained(tmp_path / folder)
        assert ours.config.padded_vocab_size() == 29
        assert ours.config.ssm_cfg == {"d_state": 5, "d_conv": 3, "dt_max": 0.5, "bias": True}
        check(folder, ours(ids).logits, want, bound(plain, want))


def test_the_hf_config_of_the_published_models(tmp_path):
    """Their -hf form carries fields of both: those of transformers count."""
    reference = reference_model(13)
    both = {"model_type": "mamba", "hidden_size": 10, "num_hidden_layers": 2, "state_size": 5,
            "conv_kernel": 3, "intermediate_size": 20, "time_step_rank": 1, "hidden_act": "silu",
            "layer_norm_epsilon": 1e-5, "vocab_size": 32, "architectures": ["MambaForCausalLM"],
            "use_cache": True}  # fmt: skip
    model = MambaLMHeadModel.from_pretrained(write_published(tmp_path, reference, **both))
    assert same(model, reference)
    assert (model.config.vocab_size, model.config.pad_vocab_size_multiple) == (32, 8)


def test_the_published_helpers(tmp_path):
    folder = write_published(tmp_path, reference_model(14))
    assert load_config_hf(str(folder))["d_model"] == 10
    weights = load_state_dict_hf(str(folder), dtype=torch.float16)
    assert {v.dtype for v in weights.values()} == {torch.float16}
    assert list(weights) == list(reference_model().state_dict())


def test_saving_beside_other_weights_is_refused(tmp_path, safetensors):
    model = fast_model(reference_model(15))
    model.save_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds other weights, pytorch_model\.bin"):
        model.save_pretrained(tmp_path, format="hf")
    with pytest.raises(ValueError, match="format: expected 'published' or 'hf', got 'gguf'"):
        model.save_pretrained(tmp_path, format="gguf")


@pytest.mark.parametrize(
    "options", [dict(rms_norm=False), dict(d_intermediate=9), dict(ssm_cfg={"expand": 1.5})], ids=str
)
def test_what_transformers_has_no_word_for(tmp_path, options):
    model = MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=9, **options))
    name = "whole numbers for expand" if "ssm_cfg" in options else next(iter(options))
    with pytest.raises(ValueError, match=f"format: 'hf' knows {name}"):
        model.save_pretrained(tmp_path / "never", format="hf")
    assert not (tmp_path / "never").exists()
    model.save_pretrained(tmp_path)
    back = MambaLMHeadModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    model = fast_model(reference_model(16))
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half_written(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("form", ["published", "hf"])
def test_files_have_the_mode_that_the_user_asks_for(tmp_path, form):
    (tmp_path / "plain").touch()
    fast_model(reference_model(7)).save_pretrained(tmp_path / "model", format=form)
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
