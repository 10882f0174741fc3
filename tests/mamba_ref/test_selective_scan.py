"""The oracle against numbers worked out by hand and the unrolled sum; the torch loop against the oracle."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_inputs import FORMS, bound64, changed_at, in_float32, in_numpy, roundings, scan_inputs

from mamba_ref import selective_scan, selective_scan_numpy
from mamba_ref.checks import check

U64 = np.finfo(np.float64).eps / 2
OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "initial_state")


def test_oracle_gives_the_numbers_worked_out_by_hand():
    # One channel, two states, two tokens. delta = 0 and delta_bias = ln(e - 1), so softplus gives a step
    # of ln(1 + e - 1) = 1. A = (-ln 2, -ln 4), so A_bar = (1/2, 1/4) at both tokens.
    #   h_1 = (1/2 * 4 + 2 * 1, 1/4 * 8 + 2 * 3)    = (4, 8)     p_1 = 1 * 4 + 1 * 8 + 0.5 * 2    =  13
    #   h_2 = (1/2 * 4 - 4 * 1, 1/4 * 8 + 4 * 2)    = (-2, 10)   p_2 = 2 * -2 - 1 * 10 + 0.5 * 4  = -12
    # z = (ln 3, -ln 3): sigmoid 3/4 and 1/4, so SiLU = (0.75 ln 3, -0.25 ln 3).
    #   y = (13 * 0.75 ln 3, -12 * -0.25 ln 3) = (9.75 ln 3, 3 ln 3)
    ln = math.log
    y, last_state, states = selective_scan_numpy(
        u=np.array([[[2.0, 4.0]]]), delta=np.zeros((1, 1, 2)), A=np.array([[-ln(2), -ln(4)]]),
        B=np.array([[[1.0, -1.0], [3.0, 2.0]]]), C=np.array([[[1.0, 2.0], [1.0, -1.0]]]),
        D=np.array([0.5]), z=np.array([[[ln(3), -ln(3)]]]), delta_bias=np.array([ln(math.e - 1)]),
        delta_softplus=True, return_last_state=True, return_states=True,
        initial_state=np.array([[[4.0, 8.0]]]),
    )  # fmt: skip
    check("states by hand", states, np.array([[[[4.0, 8.0], [-2.0, 10.0]]]]), roundings(2, 2) * U64)
    check("last state by hand", last_state, np.array([[[-2.0, 10.0]]]), roundings(2, 2) * U64)
    check("y by hand", y, np.array([[[9.75 * ln(3), 3 * ln(3)]]]), roundings(2, 2) * U64)


def test_oracle_gives_the_complex_numbers_worked_out_by_hand():
    # A = -ln 2 + i pi/2 and delta = 1, so A_bar = i/2. B = (1 + i, 2) and C = (1, i), as re, im pairs.
    #   h_1 = 1 + i                          y_1 = 2 Re(1 + i)          =  2
    #   h_2 = i/2 (1 + i) + 2 = 1.5 + i/2    y_2 = 2 Re(i (1.5 + i/2))  = -1
    y, last_state = selective_scan_numpy(
        u=np.ones((1, 1, 2)), delta=np.ones((1, 1, 2)), A=np.array([[-math.log(2) + 0.5j * math.pi]]),
        B=np.array([[[1.0, 1.0, 2.0, 0.0]]]), C=np.array([[[1.0, 0.0, 0.0, 1.0]]]), return_last_state=True,
    )  # fmt: skip
    check("complex y by hand", y, np.array([[[2.0, -1.0]]]), roundings(2, 1) * U64)
    check("complex last state by hand", last_state, np.array([[[1.5 + 0.5j]]]), roundings(2, 1) * U64)


def unrolled(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state):
    """y_t = sum_s C_t exp(A (delta_{s+1} + .. + delta_t)) delta_s B_s u_s, one number at a time."""
    (batch, d_inner, seqlen), is_complex = u.shape, np.iscomplexobj(A)

    def number(x, b, d, n, t):
        if x.ndim == 2:
            return x[d, n]
        row = x[b, n] if x.ndim == 3 else x[b, d // (d_inner // x.shape[1]), n]
        return row[2 * t] + 1j * row[2 * t + 1] if is_complex else row[t]

    y = np.empty_like(u)
    for b, d, t in np.ndindex(batch, d_inner, seqlen):
        step = (
            np.log1p(np.exp(delta[b, d] + delta_bias[d])) if delta_softplus else delta[b, d] + delta_bias[d]
        )
        total = 0
        for n in range(A.shape[1]):
            h = np.exp(A[d, n] * step[: t + 1].sum()) * initial_state[b, d, n]
            for s in range(t + 1):
                written = step[s] * number(B, b, d, n, s) * u[b, d, s]
                h = h + np.exp(A[d, n] * step[s + 1 : t + 1].sum()) * written
            total += number(C, b, d, n, t) * h
        total = 2 * total.real if is_complex else total
        y[b, d, t] = (total + D[d] * u[b, d, t]) * z[b, d, t] / (1 + np.exp(-z[b, d, t]))
    return y


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_oracle_is_the_unrolled_sum(form, softplus, complex_A):
    inputs = scan_inputs(1, B=form, C=form, complex_A=complex_A, delta_softplus=softplus, d_inner=4)
    want = unrolled(**in_numpy(inputs))
    limit = bound64(selective_scan(**in_float32(inputs)), want, roundings(5, 3))
    check("oracle = unrolled sum", selective_scan_numpy(**in_numpy(inputs)), want, limit)


def agree(inputs):
    """Compare y and last_state of the torch loop in float64 with the oracle."""
    seqlen, d_state = inputs["u"].shape[2], inputs["A"].shape[1]
    want = selective_scan_numpy(**in_numpy(inputs), return_last_state=True)
    got = selective_scan(**inputs, return_last_state=True)
    plain = selective_scan(**in_float32(inputs), return_last_state=True)
    for name, g, w, p in zip(("y", "last_state"), got, want, plain, strict=True):
        check(f"torch loop {name}", g, w, bound64(p, w, roundings(seqlen, d_state)))


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("C", FORMS)
@pytest.mark.parametrize("B", FORMS)
def test_torch_loop_is_the_oracle_with_every_option(B, C, complex_A):
    for seed, chosen in enumerate(itertools.product([False, True], repeat=len(OPTIONS))):
        agree(scan_inputs(seed, B=B, C=C, complex_A=complex_A, **dict(zip(OPTIONS, chosen, strict=True))))


@pytest.mark.parametrize("seqlen", [0, 1, 2, 63, 64, 65, 100])
@pytest.mark.parametrize("batch, d_inner, d_state, groups", [(1, 1, 1, 1), (2, 6, 5, 3), (3, 5, 7, 5)])
def test_torch_loop_is_the_oracle_at_odd_sizes(batch, d_inner, d_state, groups, seqlen):
    agree(scan_inputs(2, batch, d_inner, seqlen, d_state, B="grouped", C="variable", groups=groups))


def test_no_tokens_leave_the_state_unchanged():
    inputs = scan_inputs(3, seqlen=0)
    for got in (selective_scan(**inputs, return_last_state=True),
                selective_scan_numpy(**in_numpy(inputs), return_last_state=True)):  # fmt: skip
        assert got[0].shape == (2, 6, 0)
        check("state after no tokens", got[1], inputs["initial_state"], 0)


def test_no_sequences_give_empty_results():
    inputs = scan_inputs(4, batch=0)
    for got in (selective_scan(**inputs, return_last_state=True),
                selective_scan_numpy(**in_numpy(inputs), return_last_state=True)):  # fmt: skip
        assert [tuple(x.shape) for x in got] == [(0, 6, 5), (0, 6, 3)]


def test_softplus_is_the_identity_above_20_only():
    inputs = in_numpy(scan_inputs(5, delta_bias=False))
    for delta, same in ((20.5, True), (19.5, False)):
        inputs["delta"] = np.full((2, 6, 5), delta)
        plus, without = (selective_scan_numpy(**inputs | {"delta_softplus": s}) for s in (True, False))
        assert np.array_equal(plus, without) == same


def test_returned_states_end_in_the_last_state_and_give_y():
    inputs = in_numpy(scan_inputs(6, D=False, z=False))
    y, last_state, states = selective_scan_numpy(**inputs, return_last_state=True, return_states=True)
    assert states.shape == (2, 6, 5, 3)
    check("last of the states", states[:, :, -1], last_state, 0)
    want = np.einsum("bdln,bnl->bdl", states, inputs["C"])
    check("y = C h", y, want, bound64(want.astype(np.float32), want, roundings(1, 3)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_types_are_read_as_float32_and_rounded_once(half):
    inputs = in_float32(scan_inputs(7, seqlen=65))
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name].to(half)
    y, last_state = selective_scan(**inputs, return_last_state=True)
    want, want_state = selective_scan(**in_float32(inputs), return_last_state=True)
    assert y.dtype == half
    assert last_state.dtype == torch.float32
    check("half y", y, want.to(half), 0)
    check("state beside half inputs", last_state, want_state, 0)


@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
@pytest.mark.parametrize("t", [0, 7, 12])
def test_a_change_leaves_earlier_outputs_bitwise_equal(name, t):
    for scan, inputs in (
        (selective_scan, in_float32(scan_inputs(8, seqlen=13, B="grouped"))),
        (selective_scan_numpy, in_numpy(scan_inputs(8, seqlen=13, B="grouped"))),
    ):
        before, after = scan(**inputs), scan(**inputs | {name: changed_at(inputs[name], t)})
        check("outputs before the change", after[..., :t], before[..., :t], 0)
        assert (after[..., t] != before[..., t]).all()


@settings(max_examples=25, deadline=None)
@given(
    seqlen=st.integers(0, 20), where=st.floats(0, 1), seed=st.integers(0, 999), form=st.sampled_from(FORMS)
)
def test_a_sequence_may_be_split_anywhere(seqlen, where, seed, form):
    inputs, cut = in_numpy(scan_inputs(seed, seqlen=seqlen, B=form)), round(where * seqlen)
    want, want_state = selective_scan_numpy(**inputs, return_last_state=True)
    timed = {k for k in ("u", "delta", "B", "C", "z") if inputs[k].ndim > 2}
    head, tail = ({k: v[..., s] if k in timed else v for k, v in inputs.items()}
                  for s in (slice(0, cut), slice(cut, None)))  # fmt: skip
    y_head, state = selective_scan_numpy(**head, return_last_state=True)
    y_tail, state = selective_scan_numpy(**tail | {"initial_state": state}, return_last_state=True)
    limit = roundings(seqlen, 3) * U64
    check("y of two pieces", np.concatenate([y_head, y_tail], -1), want, limit)
    check("state of two pieces", state, want_state, limit)


def test_a_nan_stays_in_its_sequence_and_channel():
    clean = scan_inputs(9)
    dirty = clean | {"u": clean["u"].clone()}
    dirty["u"][1, 2, 3] = math.nan
    for scan, cast in ((selective_scan, dict), (selective_scan_numpy, in_numpy)):
        y, want = torch.as_tensor(scan(**cast(dirty))), torch.as_tensor(scan(**cast(clean)))
        assert y[1, 2, 3:].isnan().all()
        y[1, 2, 3:] = want[1, 2, 3:]
        check("everywhere else", y, want, 0)


@pytest.mark.parametrize("complex_A", [False, True])
def test_torch_loop_gradients_pass_gradcheck(complex_A):
    inputs = scan_inputs(10, 1, 2, 3, 2, B="grouped", C="constant", complex_A=complex_A)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]

    def scan(*values):
        return selective_scan(**inputs | dict(zip(names, values, strict=True)), return_last_state=True)

    leaves = [inputs[k].clone().requires_grad_() for k in names]
    assert torch.autograd.gradcheck(scan, leaves)
