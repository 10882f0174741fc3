"""Every formula of mamba_ref.inspect against the thing it describes, in float64."""

import math

import numpy as np
import pytest
import torch
from scan_inputs import FORMS, bound64, in_float32, in_numpy, roundings, scan_inputs

from mamba_ref import MambaLM, selective_scan, selective_scan_numpy, toy
from mamba_ref.block import MambaBlock
from mamba_ref.checks import check, errors
from mamba_ref.inspect import trace, trace_block, trace_model

U64 = np.finfo(np.float64).eps / 2


def without_gate(inputs):
    return inputs | {"z": None}


def rebuilt(seen):
    """y from the influence matrices and what the initial state carries, (B, D, L)."""
    y = np.empty_like(seen.u)
    for b, d in np.ndindex(y.shape[:2]):
        y[b, d] = seen.influence(d, b) @ seen.u[b, d] + seen.carried(d, b)
    return y


@pytest.mark.parametrize("seqlen", [1, 2, 63, 64, 65, 100])
def test_influence_rebuilds_the_output(seqlen):
    inputs = scan_inputs(seqlen, batch=1, d_inner=3, seqlen=seqlen, d_state=5)
    want = selective_scan_numpy(**in_numpy(without_gate(inputs)))
    limit = bound64(selective_scan(**in_float32(without_gate(inputs))), want, roundings(seqlen, 5))
    check(f"M u rebuilds y, L = {seqlen}", rebuilt(trace(**inputs)), want, limit)


@pytest.mark.parametrize("B", FORMS)
@pytest.mark.parametrize("C", FORMS)
@pytest.mark.parametrize("options", [True, False])
def test_influence_rebuilds_the_output_for_every_form(B, C, options):
    keep = dict.fromkeys(("D", "z", "delta_bias", "delta_softplus", "initial_state"), options)
    inputs = scan_inputs(3, seqlen=17, B=B, C=C, **keep)
    want = selective_scan_numpy(**in_numpy(without_gate(inputs)))
    limit = bound64(selective_scan(**in_float32(without_gate(inputs))), want, roundings(17, 3))
    seen = trace(**inputs)
    check("M u rebuilds y", rebuilt(seen), want, limit)
    check("gated", seen.gated, selective_scan_numpy(**in_numpy(inputs)), 4 * U64)


def test_influence_is_the_written_product():
    seen = trace(**scan_inputs(5, batch=2, d_inner=4, seqlen=9, d_state=3))
    want = np.zeros((9, 9))
    for t in range(9):
        for s in range(t + 1):
            between = np.prod(seen.decay[1, 2, s + 1 : t + 1], axis=0)  # (N,)
            want[t, s] = (seen.C[1, 2, t] * between * seen.delta[1, 2, s] * seen.B[1, 2, s]).sum()
    want += seen.D[2] * np.eye(9)
    M = seen.influence(channel=2, batch=1)
    check("M is the product of decays", M, want, 4 * roundings(9, 3) * U64)
    assert not np.triu(M, 1).any()


def test_a_column_of_influence_is_the_answer_to_one_impulse():
    inputs = in_numpy(scan_inputs(6, batch=1, d_inner=2, seqlen=20, d_state=4, z=False, initial_state=False))
    M = trace(**inputs).influence(channel=1)
    for s in (0, 7, 19):
        impulse = np.zeros_like(inputs["u"])
        impulse[0, 1, s] = 1.0
        want = selective_scan_numpy(**inputs | {"u": impulse})[0, 1]
        check(f"column {s}", M[:, s], want, 4 * roundings(20, 4) * U64)


def test_influence_is_the_jacobian_at_fixed_delta_B_and_C():
    inputs = scan_inputs(7, batch=1, d_inner=2, seqlen=11, d_state=3, z=False)

    def output(u):
        return selective_scan(**inputs | {"u": u})[0, 1]

    want = torch.autograd.functional.jacobian(output, inputs["u"])[:, 0, 1]
    check("M is dy/du", trace(**inputs).influence(channel=1), want, 4 * roundings(11, 3) * U64)


def test_influence_stays_finite_where_the_decay_of_many_tokens_underflows():
    inputs = in_numpy(scan_inputs(8, batch=1, d_inner=1, seqlen=300, d_state=2, z=False, initial_state=False))
    inputs["delta"] = inputs["delta"] + 10  # decays of about e^-10 a token: e^-3000 over the sequence
    seen = trace(**inputs)
    want = selective_scan_numpy(**inputs)[0, 0]
    check("M u with underflow", seen.influence() @ seen.u[0, 0], want, roundings(300, 2) * U64)


@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_a_state_halves_in_its_half_life_and_falls_to_1_over_e_in_its_horizon(tokens):
    A = np.array([[-0.7, -2.0]])
    impulse = np.zeros((1, 1, 40))
    impulse[0, 0, 0] = 1.0
    ones = np.ones((1, 2, 40))
    for fraction, name in ((0.5, "half_life"), (1 / math.e, "horizon")):
        for n in (0, 1):
            delta = np.full((1, 1, 40), math.log(1 / fraction) / (tokens * abs(A[0, n])))
            seen = trace(impulse, delta, A, ones, ones)
            h = seen.states[0, 0, :, n]
            check(name, getattr(seen, name)[0, 0, 0, n], tokens, 4 * U64)
            check(f"measured {name}", h[tokens] / h[0], fraction, 4 * (tokens + 2) * U64)


def test_decay_between_two_tokens_is_a_matter_of_the_clock_alone():
    inputs = in_numpy(scan_inputs(9, batch=1, d_inner=1, seqlen=30, d_state=3, z=False, initial_state=False))
    inputs["u"] = np.zeros_like(inputs["u"])
    inputs["u"][0, 0, 4] = 1.0
    seen = trace(**inputs)
    h, tau = seen.states[0, 0], seen.clock[0, 0]
    want = h[4] * np.exp(seen.A[0] * (tau[4:, None] - tau[4]))
    check("h_t = exp(A (tau_t - tau_s)) h_s", h[4:], want, 4 * roundings(30, 1) * U64)


def test_delta_and_decay_are_those_of_the_recurrence():
    inputs = in_numpy(scan_inputs(10, seqlen=7))
    seen = trace(**inputs)
    want = np.log1p(np.exp(inputs["delta"] + inputs["delta_bias"][:, None]))
    check("delta after bias and softplus", seen.delta, want, 4 * U64)
    written = (seen.delta * seen.u)[:, :, 1:, None] * seen.B[:, :, 1:]
    want = seen.decay[:, :, 1:] * seen.states[:, :, :-1] + written
    check("h_t = decay h + delta B u", seen.states[:, :, 1:], want, roundings(7, 1) * U64)


def test_a_step_of_zero_has_an_endless_horizon():
    seen = trace(**toy.scan_inputs())
    marked = toy.signal().mark == 1
    assert np.isinf(seen.horizon[0, 0, ~marked]).all()
    check("horizon at a mark", seen.horizon[0, 0, marked], np.full((3, 1), 1 / 8), U64)


def test_trace_block_sees_what_the_block_computes():
    torch.manual_seed(0)
    block = MambaBlock(6, d_state=3).double()
    hidden = torch.randn(2, 13, 6, dtype=torch.float64)
    seen = trace_block(block, hidden)
    out = torch.from_numpy(seen.gated).mT @ block.out_proj.weight.T
    check("the block's output from its trace", out, block(hidden), 4 * roundings(13, 3) * U64)


def test_trace_model_sees_what_every_layer_computes():
    torch.manual_seed(0)
    model = MambaLM(6, 3, 11, d_state=3).double()
    ids = torch.randint(11, (2, 13))
    with torch.no_grad():
        seen, (logits, states) = trace_model(model, ids), model.prefill(ids)
        residual = model.backbone.embedding(ids)
        for one, layer in zip(seen, model.backbone.layers, strict=True):
            residual = residual + torch.from_numpy(one.gated).mT @ layer.mixer.out_proj.weight.T
        rebuilt = model.lm_head(model.backbone.norm_f(residual, None)[0])
    assert len(seen) == 3
    for one, (_, state) in zip(seen, states, strict=True):
        check("a layer's last states", one.states[:, :, -1], state, 4 * roundings(13, 3) * U64)
    check("logits from the traces", rebuilt, logits, 8 * roundings(13, 3) * U64)
    assert all(not layer.norm._forward_hooks for layer in model.backbone.layers)


def test_trace_leaves_its_arguments_alone():
    inputs = scan_inputs(11)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    trace(**inputs)
    assert all(errors(inputs[k], v) == (0, 0) for k, v in before.items())


def test_what_cannot_be_traced_is_named():
    with pytest.raises(TypeError, match="A: got complex128"):
        trace(**scan_inputs(12, complex_A=True))
    seen = trace(**scan_inputs(12, batch=2, d_inner=6))
    with pytest.raises(IndexError):
        seen.influence(channel=6)
    with pytest.raises(IndexError):
        seen.influence(batch=2)
