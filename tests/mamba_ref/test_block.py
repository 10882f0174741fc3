"""The block: published names and initial values, an independent forward pass, sequence form = step form."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scan_inputs import bound64, roundings

from mamba_ref import MambaBlock, selective_scan
from mamba_ref.checks import bound, check

SHAPES = {  # of MambaBlock(20, d_state=5, d_conv=3, expand=3): D = 60, R = ceil(20 / 16) = 2, N = 5, K = 3
    "A_log": (60, 5), "D": (60,), "in_proj.weight": (120, 20),
    "conv1d.weight": (60, 1, 3), "conv1d.bias": (60,),
    "x_proj.weight": (12, 60), "dt_proj.weight": (60, 2), "dt_proj.bias": (60,), "out_proj.weight": (20, 60),
}  # fmt: skip


def count(seqlen):
    """Roundings on the longest path: dot products over d_model, K, D, R and D numbers, and the scan."""
    return 20 + 3 + 60 + 2 + 60 + roundings(seqlen, 5)


def seeded_block(seed=0, d_model=20, **sizes):
    """A block in float64 whose parameters, all random, float32 holds exactly; one that forgets visibly."""
    torch.manual_seed(seed)
    block = MambaBlock(
        d_model, **{"d_state": 5, "d_conv": 3, "expand": 3, "dt_min": 0.1, "dt_max": 1} | sizes
    )
    with torch.no_grad():
        block.A_log += torch.randn_like(block.A_log) / 4
        block.D += torch.randn_like(block.D)
    return block.double()


def hidden(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def float32_copy(block):
    copy = MambaBlock(block.in_proj.in_features, 5, 3, 3)
    copy.load_state_dict(block.state_dict())
    return copy


def independent(p, x):
    """The block written again from the paper's figure 3, on a dict of parameters: no function of ours."""
    xz = x @ p["in_proj.weight"].T
    x, z = xz[..., : xz.shape[-1] // 2].mT, xz[..., xz.shape[-1] // 2 :].mT
    width = p["conv1d.weight"].shape[-1]
    u = F.silu(F.conv1d(F.pad(x, (width - 1, 0)), p["conv1d.weight"], p["conv1d.bias"], groups=x.shape[1]))
    rank, d_state = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    dt_B_C = torch.einsum("kd,bdl->bkl", p["x_proj.weight"], u)
    dt, B, C = dt_B_C[:, :rank], dt_B_C[:, rank : rank + d_state], dt_B_C[:, rank + d_state :]
    delta = F.softplus(torch.einsum("dr,brl->bdl", p["dt_proj.weight"], dt) + p["dt_proj.bias"][:, None])
    clock = delta.cumsum(-1)  # the decay from s to t is exp(A (clock_t - clock_s))
    passed = clock[..., :, None] - clock[..., None, :]  # (B, D, L, L)
    decay = torch.exp(-p["A_log"].exp()[:, :, None, None] * passed[:, :, None].tril())  # (B, D, N, L, L)
    M = torch.einsum("bnt,bdnts,bns,bds->bdts", C, decay, B, delta).tril()
    y = (M @ u[..., None])[..., 0] + p["D"][:, None] * u
    return (y * F.silu(z)).mT @ p["out_proj.weight"].T


def test_published_names_and_shapes():
    block = MambaBlock(20, d_state=5, d_conv=3, expand=3)
    assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == SHAPES
    assert MambaBlock(16).dt_proj.in_features == 1
    assert MambaBlock(17).dt_proj.in_features == 2
    assert MambaBlock(16, dt_rank=3).dt_proj.in_features == 3


def test_published_weights_decide_the_output():
    generator = torch.Generator().manual_seed(1)
    weights = {k: torch.randn(s, generator=generator).double() / 4 for k, s in SHAPES.items()}
    block = MambaBlock(20, d_state=5, d_conv=3, expand=3).double()
    block.load_state_dict(weights)
    x = hidden(2, 2, 9, 20)
    want = independent(weights, x)
    plain = independent({k: v.float() for k, v in weights.items()}, x.float())
    check("block with loaded weights", block(x), want, bound64(plain, want, count(9)))


def test_published_initial_values():
    torch.manual_seed(3)
    block = MambaBlock(256)
    A = -torch.exp(block.A_log)
    check("A = -1 .. -N", A, -torch.arange(1.0, 17).repeat(512, 1), 4 * 2.0**-24)
    check("D = 1", block.D, torch.ones(512), 0)
    assert block.dt_proj.weight.abs().max() <= 16**-0.5
    assert block.dt_proj.weight.std().item() == pytest.approx(
        16**-0.5 / 3**0.5, rel=4 / (2 * 512 * 16) ** 0.5
    )
    step = F.softplus(block.dt_proj.bias)
    u32 = 2.0**-24  # the inverse of softplus rounds numbers near ln(0.001) = -7: a few 1e-6 of the step
    assert 0.001 * (1 - 32 * u32) <= step.min()
    assert step.max() <= 0.1 * (1 + 32 * u32)
    # Log-uniform: the mean of 512 logarithms lies within 4 standard errors of the middle.
    spread = math.log(100) / 12**0.5 / 512**0.5
    assert step.log().mean().item() == pytest.approx(math.log(0.01), abs=4 * spread)


def test_the_initial_step_has_a_floor():
    torch.manual_seed(4)
    step = F.softplus(MambaBlock(64, dt_min=1e-7, dt_max=1e-6).dt_proj.bias)
    check("floor", step, torch.full((128,), 1e-4), 32 * 2.0**-24)


@pytest.mark.parametrize("batch, seqlen", [(1, 1), (2, 2), (1, 3), (2, 65), (0, 4)])
def test_forward_is_an_independent_forward(batch, seqlen):
    block, x = seeded_block(5), hidden(6, batch, seqlen, 20)
    want = independent(dict(block.named_parameters()), x)
    plain = independent({k: v.float() for k, v in block.named_parameters()}, x.float())
    check("block", block(x), want, bound64(plain, want, count(seqlen)))


def test_scan_inputs_are_what_the_scan_gets():
    block, x = seeded_block(7), hidden(8, 2, 9, 20)
    inputs = block.scan_inputs(x)
    assert {k: tuple(v.shape) for k, v in inputs.items() if k != "delta_softplus"} == {
        "u": (2, 60, 9), "delta": (2, 60, 9), "z": (2, 60, 9), "A": (60, 5), "B": (2, 5, 9), "C": (2, 5, 9),
        "D": (60,), "delta_bias": (60,),
    }  # fmt: skip
    assert inputs["delta_softplus"] is True
    check("out_proj of the scan", block.out_proj(selective_scan(**inputs).mT), block(x), 0)
    check("delta_bias is apart", inputs["delta_bias"], block.dt_proj.bias, 0)


@pytest.mark.parametrize("batch, seqlen", [(1, 1), (2, 2), (1, 65), (2, 100)])
def test_step_form_is_the_sequence_form(batch, seqlen):
    block, x = seeded_block(9), hidden(10, batch, seqlen, 20)
    want, want_conv, want_ssm = block.prefill(x)
    plain_block = float32_copy(block)
    plain, plain_conv, plain_ssm = plain_block.prefill(x.float())
    (conv_state, ssm_state), outs = plain_block.allocate_state(batch), []
    assert conv_state.shape == (batch, 60, 3)
    for t in range(seqlen):
        out, conv_state, ssm_state = plain_block.step(x.float()[:, t : t + 1], conv_state, ssm_state)
        outs.append(out)
    check("outputs", torch.cat(outs, 1), want, bound(plain, want))
    check("conv state", conv_state, want_conv, bound(plain_conv, want_conv))
    check("state", ssm_state, want_ssm, bound(plain_ssm, want_ssm))


@pytest.mark.parametrize("cut", [0, 1, 2, 8, 9])
def test_a_prompt_may_be_read_in_pieces(cut):
    block, x = seeded_block(11), hidden(12, 2, 9, 20)
    plain = float32_copy(block)(x.float())
    head, *states = block.prefill(x[:, :cut])
    tail, *states = block.prefill(x[:, cut:], *states)
    want, *want_states = block.prefill(x)
    limit = bound64(plain, want, count(9))
    check("two pieces", torch.cat([head, tail], 1), want, limit)
    for got, state in zip(states, want_states, strict=True):
        check("state of two pieces", got, state, limit)


@pytest.mark.parametrize("t", [0, 5, 12])
def test_a_change_leaves_earlier_outputs_bitwise_equal(t):
    block, x = float32_copy(seeded_block(13)), hidden(14, 2, 13, 20).float()
    changed = x.clone()
    changed[:, t] += 1
    before, after = block(x), block(changed)
    check("outputs before the change", after[:, :t], before[:, :t], 0)
    assert (after[:, t:] != before[:, t:]).any(-1).all()


def test_a_step_leaves_the_old_states_as_they_were():
    block, x = seeded_block(15), hidden(16, 2, 4, 20)
    _, *states = block.prefill(x)
    kept = [s.clone() for s in states]
    block.step(x[:, :1], *states)
    for state, want in zip(states, kept, strict=True):
        check("old state", state, want, 0)


def test_every_parameter_gets_the_same_gradient_on_both_paths():
    block, x = seeded_block(17), hidden(18, 2, 6, 20)
    weight = hidden(19, 2, 6, 20)
    names, parameters = zip(*block.named_parameters(), strict=True)
    want = torch.autograd.grad((weight * block(x)).sum(), parameters)
    plain_block = float32_copy(block)
    plain = torch.autograd.grad(
        (weight.float() * plain_block(x.float())).sum(), list(plain_block.parameters())
    )
    states, outs = block.allocate_state(2), []
    for t in range(6):
        out, *states = block.step(x[:, t : t + 1], *states)
        outs.append(out)
    got = torch.autograd.grad((weight * torch.cat(outs, 1)).sum(), parameters)
    for name, g, w, p in zip(names, got, want, plain, strict=True):
        assert w.abs().max() > 0
        check(f"gradient of {name}", g, w, bound64(p, w, 2 * count(6)))


def test_half_layers_keep_the_scan_in_float32():
    block, x = seeded_block(20).bfloat16(), hidden(21, 2, 9, 20).bfloat16()
    inputs = block.scan_inputs(x)
    assert {inputs[k].dtype for k in ("A", "D", "delta_bias")} == {torch.float32}
    assert {inputs[k].dtype for k in ("u", "delta", "B", "C", "z")} == {torch.bfloat16}
    conv_state, ssm_state = block.allocate_state(2)
    assert (conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.float32)
    reread = seeded_block(20)  # float64 layers with the rounded weights: the truth for these weights
    reread.load_state_dict(block.state_dict())
    want, plain = reread(x.double()), block(x)
    outs = []
    for t in range(9):
        out, conv_state, ssm_state = block.step(x[:, t : t + 1], conv_state, ssm_state)
        outs.append(out)
    assert plain.dtype == outs[0].dtype == torch.bfloat16
    assert ssm_state.dtype == torch.float32
    check("half steps", torch.cat(outs, 1), want, bound(plain, want))
    assert np.isfinite(bound(plain, want))
