"""Sizes, types and options of the language model."""

import inspect

import pytest
import torch
from model_inputs import BLOCK, CONFIG, fast_model, reference_model, token_ids

from mamba_fast import InferenceParams, MambaConfig, MambaLMHeadModel, MixerModel, mixer
from mamba_ref.checks import bound, check

SIZES = [  # d_model, n_layer, parameters
    (768, 24, 129_135_360),
    (1024, 48, 371_516_416),
    (1536, 48, 793_204_224),
    (2048, 48, 1_372_178_432),
    (2560, 64, 2_768_345_600),
]


@pytest.mark.parametrize("d_model, n_layer, count", SIZES)
def test_published_sizes_have_exactly_their_parameters(d_model, n_layer, count):
    model = MambaLMHeadModel(MambaConfig(d_model=d_model, n_layer=n_layer), device="meta")
    assert model.backbone.embedding.weight.shape == (50280, d_model)
    assert sum(p.numel() for p in model.parameters()) == count


def test_published_keys_and_order():
    """Those of the reference, whose own test has the list of them."""
    assert list(fast_model(reference_model()).state_dict()) == list(reference_model().state_dict())


def test_published_defaults():
    assert vars(MambaConfig()) == dict(
        d_model=2560, d_intermediate=0, n_layer=64, vocab_size=50277, ssm_cfg={}, attn_layer_idx=[],
        attn_cfg={}, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8,
        tie_embeddings=True,
    )  # fmt: skip
    of_model = inspect.signature(MambaLMHeadModel).parameters
    assert list(of_model) == ["config", "initializer_cfg", "device", "dtype"]
    of_forward = list(inspect.signature(MambaLMHeadModel.forward).parameters)
    assert of_forward[1:] == [
        "input_ids",
        "position_ids",
        "inference_params",
        "num_last_tokens",
        "mixer_kwargs",
    ]
    of_backbone = list(inspect.signature(MixerModel).parameters)
    assert of_backbone == [
        "d_model", "n_layer", "d_intermediate", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg",
        "norm_epsilon", "rms_norm", "initializer_cfg", "fused_add_norm", "residual_in_fp32", "device",
        "dtype",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "vocab_size, multiple, rows", [(1, 8, 8), (8, 8, 8), (9, 8, 16), (27, 1, 27), (27, 16, 32)]
)
def test_vocabulary_is_padded(vocab_size, multiple, rows):
    config = MambaConfig(d_model=2, n_layer=1, vocab_size=vocab_size, pad_vocab_size_multiple=multiple)
    model = MambaLMHeadModel(config)
    assert model.lm_head.weight.shape == (rows, 2)
    assert model(torch.zeros(1, 1, dtype=torch.long)).logits.shape == (1, 1, rows)


@pytest.mark.parametrize("tie", [True, False])
def test_head_and_embedding(tie):
    model = MambaLMHeadModel(MambaConfig(d_model=4, n_layer=1, vocab_size=9, tie_embeddings=tie))
    assert (model.lm_head.weight is model.backbone.embedding.weight) == tie


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_model_keeps_the_recurrence_in_float32(dtype):
    model = MambaLMHeadModel(CONFIG, dtype=dtype)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith(("A_log", ".D")) else dtype), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_a_half_model(dtype):
    """Within the bound of the reference in that type, in the sequence form and step by step."""
    model, ids = fast_model(reference_model(1), dtype=dtype), token_ids(2, 2, 9)
    plain, exact = reference_model(1).to(dtype), reference_model(1)
    single = {k: v for k, v in model.state_dict().items() if k.endswith(("A_log", ".D"))}
    exact.load_state_dict(model.state_dict())
    for block in (layer.mixer for layer in plain.backbone.layers):
        block.A_log.data, block.D.data = block.A_log.data.float(), block.D.data.float()
    plain.load_state_dict(single, strict=False)
    with torch.no_grad():
        logits, params = model(ids).logits, InferenceParams(max_seqlen=9, max_batch_size=2)
        params.key_value_memory_dict = model.allocate_inference_cache(2, 9, dtype=torch.float32)
        steps = []
        for t in range(9):
            steps.append(model(ids[:, t : t + 1], inference_params=params).logits)
            params.seqlen_offset = t + 1
        want = exact(ids)
        limit = bound(plain(ids), want)
    assert logits.dtype == dtype
    check("sequence", logits, want, limit)
    check("steps", torch.cat(steps, 1), want, limit)


@pytest.mark.parametrize("use_fast_path", [True, False])
def test_the_bias_of_delta_enters_in_float32(use_fast_path, monkeypatch):
    """It is added inside the scan: delta comes without it, in the type of the layers."""
    given = {}

    def spy(function, names):
        def call(*args, **kwargs):
            given.update(dict(zip(names, args, strict=False)) | kwargs)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(
        mixer, "selective_scan_fn", spy(mixer.selective_scan_fn, ("u", "delta", "A", "B", "C", "D"))
    )
    monkeypatch.setattr(mixer, "mamba_inner_fn", spy(mixer.mamba_inner_fn, ()))
    torch.manual_seed(3)
    block = mixer.Mamba(8, use_fast_path=use_fast_path, dtype=torch.bfloat16)
    block(torch.randn(1, 5, 8, dtype=torch.bfloat16))
    assert torch.equal(given["delta_bias"], block.dt_proj.bias.float())
    assert {given[k].dtype for k in ("delta_bias", "D")} == {torch.float32}
    if not use_fast_path:
        assert {given[k].dtype for k in ("u", "delta", "B", "C")} == {torch.bfloat16}
        assert given["A"].dtype == torch.float32
        assert given["delta"].abs().max() < block.dt_proj.bias.abs().min()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ssm_cfg={"layer": "Mamba2"}), "ssm_cfg: expected layer 'Mamba1', got 'Mamba2'"),
        (dict(attn_layer_idx=[1]), r"attn_layer_idx: attention layers are not supported, got \[1\]"),
    ],
    ids=["layer", "attention"],
)
def test_other_layers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MambaLMHeadModel(MambaConfig(d_model=8, n_layer=2, vocab_size=9, **options))


def test_options_of_the_config_reach_the_model():
    config = MambaConfig(
        d_model=8,
        n_layer=2,
        vocab_size=9,
        d_intermediate=30,
        rms_norm=False,
        ssm_cfg=BLOCK | {"layer": "Mamba1"},
    )
    model = MambaLMHeadModel(config, initializer_cfg={"initializer_range": 0.5})
    first = model.backbone.layers[0]
    assert (type(first.norm).__name__, first.mixer.d_state, first.mlp.fc1.weight.shape) == (
        "LayerNorm",
        5,
        (256, 8),
    )
    assert model.backbone.embedding.weight.std() > 0.3
    assert model(token_ids(1, 1, 3) % 9).logits.shape == (1, 3, 16)
