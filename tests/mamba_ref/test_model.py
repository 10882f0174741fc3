"""The language model: published keys and sizes, logits on both paths, greedy text, the float32 residual."""

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import bound64, roundings

from mamba_ref import MambaLM
from mamba_ref.checks import bound, check

BLOCK = dict(d_state=5, d_conv=3, dt_min=0.1, dt_max=1)
MIXER = {  # of a block of width 10: D = 20, R = 1, N = 5, K = 3
    "A_log": (20, 5), "D": (20,), "in_proj.weight": (40, 10),
    "conv1d.weight": (20, 1, 3), "conv1d.bias": (20,),
    "x_proj.weight": (11, 20), "dt_proj.weight": (20, 1), "dt_proj.bias": (20,), "out_proj.weight": (10, 20),
}  # fmt: skip


def seeded_model(seed=0, n_layer=3):
    """A model in float64 whose parameters float32 holds exactly, with logits far from equal."""
    torch.manual_seed(seed)
    model = MambaLM(10, n_layer, 27, **BLOCK)
    with torch.no_grad():
        model.backbone.embedding.weight *= 50
    return model.double()


def float32_copy(model):
    copy = MambaLM(10, len(model.backbone.layers), 27, **BLOCK)
    copy.load_state_dict(model.state_dict())
    return copy


def token_ids(seed, batch, seqlen):
    return torch.randint(27, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def published_shapes():
    shapes = {
        "backbone.embedding.weight": (32, 10),
        "backbone.norm_f.weight": (10,),
        "lm_head.weight": (32, 10),
    }
    for i in range(3):
        shapes[f"backbone.layers.{i}.norm.weight"] = (10,)
        shapes |= {f"backbone.layers.{i}.mixer.{k}": s for k, s in MIXER.items()}
    return shapes


def test_published_keys_and_shapes():
    assert {k: tuple(v.shape) for k, v in seeded_model().state_dict().items()} == published_shapes()


def test_published_weights_load_and_decide_the_logits():
    generator = torch.Generator().manual_seed(1)
    weights = {k: torch.randn(s, generator=generator).double() / 2 for k, s in published_shapes().items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    model = seeded_model()
    model.load_state_dict(weights)
    for name, value in model.state_dict().items():
        check(name, value, weights[name], 0)
    ids = token_ids(2, 2, 9)
    stream = weights["backbone.embedding.weight"][ids]
    for i, layer in enumerate(model.backbone.layers):  # a stream that every block reads through its norm
        normed = F.rms_norm(stream, (10,), weights[f"backbone.layers.{i}.norm.weight"], 1e-5)
        stream = stream + layer.mixer(normed)
    want = F.rms_norm(stream, (10,), weights["backbone.norm_f.weight"], 1e-5) @ weights["lm_head.weight"].T
    plain = float32_copy(model)(ids)
    # In each of 3 layers: a norm, dot products over d_model, K, D, R and D numbers, the scan; then the head.
    count = 3 * (15 + 10 + 3 + 20 + 1 + 20 + roundings(9, 5)) + 25
    check("logits", model(ids), want, bound64(plain, want, count))


def test_head_and_embedding_are_one_parameter():
    model = seeded_model()
    assert model.lm_head.weight is model.backbone.embedding.weight
    model.load_state_dict(model.state_dict())
    assert model.lm_head.weight is model.backbone.embedding.weight


@pytest.mark.parametrize(
    "d_model, n_layer, count",
    [(768, 24, 129_135_360), (1024, 48, 371_516_416), (1536, 48, 793_204_224),
     (2048, 48, 1_372_178_432), (2560, 64, 2_768_345_600)],
)  # fmt: skip
def test_published_sizes_have_exactly_their_parameters(d_model, n_layer, count):
    with torch.device("meta"):
        model = MambaLM(d_model, n_layer, 50277)
    assert model.backbone.embedding.weight.shape == (50280, d_model)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("vocab_size, padded", [(1, 8), (8, 8), (9, 16), (50277, 50280)])
def test_vocabulary_is_padded_to_a_multiple_of_8(vocab_size, padded):
    model = MambaLM(2, 1, vocab_size)
    assert model.lm_head.weight.shape == (padded, 2)
    assert model.vocab_size == vocab_size


def test_published_initial_values():
    torch.manual_seed(3)
    model = MambaLM(64, 4, 512)
    weight = model.backbone.embedding.weight
    assert weight.std().item() == pytest.approx(
        0.02, rel=4 / (2 * weight.numel()) ** 0.5
    )  # 4 standard errors
    limit = 128**-0.5 / 4**0.5  # the default range of a Linear with 128 inputs, over the root of n_layer
    for layer in model.backbone.layers:
        largest = layer.mixer.out_proj.weight.abs().max()
        assert 0.99 * limit < largest <= limit * (1 + 2.0**-22)
        check("norm weight", layer.norm.weight, torch.ones(64), 0)


@pytest.mark.parametrize("batch, seqlen", [(1, 1), (2, 2), (1, 64), (2, 65)])
def test_logits_of_the_step_form_are_those_of_the_sequence_form(batch, seqlen):
    model, ids = seeded_model(4), token_ids(5, batch, seqlen)
    want, want_states = model.prefill(ids)
    plain_model = float32_copy(model)
    plain, plain_states = plain_model.prefill(ids)
    states, logits = plain_model.allocate_state(batch), []
    for t in range(seqlen):
        step_logits, states = plain_model.step(ids[:, t], states)
        logits.append(step_logits)
    assert logits[0].shape == (batch, 32)
    check("logits", torch.stack(logits, 1), want, bound(plain, want))
    for got, p, w in zip(states, plain_states, want_states, strict=True):
        check("conv state", got[0], w[0], bound(p[0], w[0]))
        check("state", got[1], w[1], bound(p[1], w[1]))


@pytest.mark.parametrize("t", [0, 5, 12])
def test_a_change_leaves_earlier_logits_bitwise_equal(t):
    model, ids = float32_copy(seeded_model(6)), token_ids(7, 2, 13)
    changed = ids.clone()
    changed[:, t] = (changed[:, t] + 1) % 27
    before, after = model(ids), model(changed)
    check("logits before the change", after[:, :t], before[:, :t], 0)
    assert (after[:, t:] != before[:, t:]).any(-1).all()


@pytest.mark.parametrize("n", [0, 1, 12])
def test_greedy_is_the_argmax_of_the_whole_prefix_each_time(n):
    model, prompt = seeded_model(8), token_ids(9, 2, 4)
    with torch.no_grad():  # blocks that outweigh the token they read, or the text would repeat it for ever
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight *= 100
    want = prompt
    for _ in range(n):
        with torch.no_grad():
            token = model(want)[:, -1, :27].argmax(-1)
        want = torch.cat([want, token[:, None]], 1)
    got = model.greedy(prompt, n)
    assert got.tolist() == want.tolist()
    assert len(set(got[:, 4:].flatten().tolist())) >= min(n, 4)  # it does not repeat one token


def test_greedy_never_chooses_padding():
    model, prompt = seeded_model(10), token_ids(11, 2, 4)
    with torch.no_grad():  # no input reaches these rows, and one of the two signs wins every argmax
        model.lm_head.weight[27] = 100
        model.lm_head.weight[28] = -100
        assert (model(prompt)[:, -1].argmax(-1) >= 27).all()
    assert model.greedy(prompt, 9).max() < 27


def test_the_residual_stream_is_float32_in_a_half_model():
    model = seeded_model(12).bfloat16()
    seen = []
    for layer in model.backbone.layers:
        layer.norm.register_forward_hook(lambda module, args, out: seen.append((out[0].dtype, out[1].dtype)))
    logits = model(token_ids(13, 1, 5))
    assert seen == [(torch.bfloat16, torch.float32)] * 3
    assert logits.dtype == torch.bfloat16


def test_every_parameter_gets_a_gradient():
    model, ids = seeded_model(14), token_ids(15, 2, 9)
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
