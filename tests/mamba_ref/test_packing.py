"""Packed sequences: equal to each sequence alone, and to a loop that clears the state at every start."""

import numpy as np
import pytest
import torch
from scan_inputs import FORMS, bound64, in_float32, in_numpy, roundings, scan_inputs

from mamba_ref import selective_scan, selective_scan_numpy
from mamba_ref.checks import check

SEQ_IDX = np.array([[4, 4, 4, 4, 7, 7, 0], [1, 2, 2, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5]])  # (B, L)
CU_SEQLENS = np.array([0, 3, 3, 4, 9])  # lengths 3, 0, 1 and 5


def with_resets(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, starts):
    """The scan with variable B and C, real A, whose state becomes zero where `starts` (B, L) is true."""
    delta = delta + delta_bias[:, None]
    delta = np.log1p(np.exp(delta)) if delta_softplus else delta
    h, y = initial_state, np.empty_like(u)
    for t in range(u.shape[2]):
        h = np.where(starts[:, t, None, None], 0, h)
        h = np.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        y[:, :, t] = (h * C[:, None, :, t]).sum(-1)
    return (y + D[:, None] * u) * z / (1 + np.exp(-z)), h


def test_seq_idx_clears_the_state_at_every_start():
    inputs = scan_inputs(1, batch=3, seqlen=7)
    starts = np.zeros(SEQ_IDX.shape, bool)
    starts[:, 1:] = SEQ_IDX[:, 1:] != SEQ_IDX[:, :-1]
    want = with_resets(**in_numpy(inputs), starts=starts)
    got = selective_scan_numpy(**in_numpy(inputs), return_last_state=True, seq_idx=SEQ_IDX)
    plain = selective_scan(**in_float32(inputs), return_last_state=True, seq_idx=torch.from_numpy(SEQ_IDX))
    for name, g, w, p in zip(("y", "last_state"), got, want, plain, strict=True):
        check(f"seq_idx {name}", g, w, bound64(p, w, roundings(7, 3)))


def alone(inputs, row, start, stop, initial_state):
    """The arguments of one sequence by itself; complex B and C hold two numbers a token."""
    width = 2 if np.iscomplexobj(inputs["A"]) else 1
    piece = dict(inputs, initial_state=initial_state)
    for name in ("u", "delta", "z", "B", "C"):
        w = width if name in "BC" else 1
        if inputs[name].ndim > 2:
            piece[name] = inputs[name][row : row + 1, ..., start * w : stop * w]
    return piece


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_seq_idx_equals_every_sequence_alone(form, complex_A):
    inputs = in_numpy(scan_inputs(2, batch=3, seqlen=7, B=form, C=form, complex_A=complex_A))
    y, last_state, states = selective_scan_numpy(
        **inputs, return_last_state=True, return_states=True, seq_idx=SEQ_IDX
    )
    for row, start, stop in [(0, 0, 4), (0, 4, 6), (0, 6, 7), (1, 0, 1), (1, 1, 7), (2, 0, 7)]:
        first = inputs["initial_state"][row : row + 1] if start == 0 else None
        want = selective_scan_numpy(
            **alone(inputs, row, start, stop, first), return_last_state=True, return_states=True
        )
        check("y of one sequence", y[row : row + 1, :, start:stop], want[0], 0)
        check("states of one sequence", states[row : row + 1, :, start:stop], want[2], 0)
        if stop == 7:
            check("last state of the row", last_state[row : row + 1], want[1], 0)


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_cu_seqlens_equals_every_sequence_alone(form, complex_A):
    inputs = in_numpy(scan_inputs(3, batch=1, seqlen=9, B=form, C=form, complex_A=complex_A))
    inputs["initial_state"] = np.concatenate([inputs["initial_state"] * k for k in (1, 2, 3, 4)])  # (S, D, N)
    y, last_state = selective_scan_numpy(**inputs, return_last_state=True, cu_seqlens=CU_SEQLENS)
    assert last_state.shape == (4, 6, 3)
    for k, (start, stop) in enumerate([(0, 3), (3, 3), (3, 4), (4, 9)]):
        piece = alone(inputs, 0, start, stop, inputs["initial_state"][k : k + 1])
        want, want_state = selective_scan_numpy(**piece, return_last_state=True)
        check(f"y of sequence {k}", y[:, :, start:stop], want, 0)
        check(f"last state of sequence {k}", last_state[k : k + 1], want_state, 0)
    check("an empty sequence keeps its state", last_state[1], inputs["initial_state"][1], 0)


@pytest.mark.parametrize("complex_A", [False, True])
def test_torch_packing_is_the_oracle(complex_A):
    for packed in ({"seq_idx": SEQ_IDX}, {"cu_seqlens": CU_SEQLENS}):
        batch, seqlen = (3, 7) if "seq_idx" in packed else (1, 9)
        inputs = scan_inputs(4, batch, seqlen=seqlen, B="grouped", complex_A=complex_A)
        if batch == 1:
            inputs["initial_state"] = torch.cat([inputs["initial_state"] * k for k in (1, 2, 3, 4)])
        in_torch = {k: torch.from_numpy(v) for k, v in packed.items()}
        want = selective_scan_numpy(**in_numpy(inputs), return_last_state=True, **packed)
        got = selective_scan(**inputs, return_last_state=True, **in_torch)
        plain = selective_scan(**in_float32(inputs), return_last_state=True, **in_torch)
        for g, w, p in zip(got, want, plain, strict=True):
            check("packed torch loop", g, w, bound64(p, w, roundings(seqlen, 3)))


def test_no_gradient_crosses_a_border():
    inputs = scan_inputs(5, batch=1, seqlen=7)
    inputs["u"].requires_grad_()
    inputs["initial_state"].requires_grad_()
    y = selective_scan(**inputs, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    du, dinitial = torch.autograd.grad(y[..., 3:5].sum(), [inputs["u"], inputs["initial_state"]])
    used = du.ne(0).all(dim=(0, 1))
    assert used.tolist() == [False, False, False, True, True, False, False]
    assert not dinitial.any()
    dinitial = torch.autograd.grad(selective_scan(**inputs)[..., 3:5].sum(), inputs["initial_state"])[0]
    assert dinitial.all()
