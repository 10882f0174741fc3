"""Random arguments of the causal convolution, its reference for packed rows, and their comparison."""

import functools

import torch

from mamba_fast import causal_conv1d_fn
from mamba_ref.causal_conv import causal_conv, causal_conv_numpy
from mamba_ref.checks import Row, bounds, errors


def turned(x):
    """The same tensor with channels side by side in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def conv_inputs(
    seed, batch=2, d_inner=5, seqlen=9, width=4, *, bias=True, initial_states=True, layout="rows"
):
    """Random arguments by name, float64 tensors whose values float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).double()

    x = normal(batch, d_inner, seqlen)
    return {
        "x": x if layout == "rows" else turned(x),
        "weight": normal(d_inner, width),
        "bias": normal(d_inner) if bias else None,
        "initial_states": normal(batch, d_inner, width - 1) if initial_states else None,
    }


def reference(x, weight, bias, initial_states, activation, seq_idx, conv=causal_conv):
    """(y, final states) of each packed sequence alone, put side by side; padding is 0."""
    rows, finals = [], []
    for b in range(len(x)):
        marks = [0] * x.shape[2] if seq_idx is None else seq_idx[b].tolist()
        starts = [t for t in range(len(marks)) if t == 0 or marks[t] != marks[t - 1]]
        pieces = []
        for start, end in zip(starts, [*starts[1:], len(marks)], strict=True):
            piece = x[b : b + 1, :, start:end] * (marks[start] >= 0)
            past = torch.zeros(1, *weight.shape, dtype=x.dtype)
            if initial_states is not None and start == 0:
                past[..., 1:] = initial_states[b : b + 1] * (marks[0] >= 0)
            y, final = conv(piece, weight, bias, activation, initial_state=past, return_last_state=True)
            pieces.append(y * (marks[start] >= 0))
        rows.append(torch.cat([torch.as_tensor(piece) for piece in pieces], -1))
        finals.append(torch.as_tensor(final[..., 1:]))
    return torch.cat(rows), torch.cat(finals)


def outcome(function, inputs):
    """y, final states and every gradient by name, for random cotangents of both."""
    given = {k: v for k, v in inputs.items() if v is not None}
    leaves = {k: v.detach().requires_grad_() for k, v in given.items()}
    y, final = function(**{k: leaves.get(k) for k in inputs})
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(v.shape, generator=generator).to(v) for v in (y, final)]
    grads = torch.autograd.grad((y, final), list(leaves.values()), cotangents)
    return {"y": y, "final_states": final, **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}


def check_agrees(
    inputs, backend, device="cpu", dtype=torch.float32, activation="silu", seq_idx=None, wide=None
):
    """Assert that outputs and gradients agree with float64, tensor by tensor, within the computed bound."""
    narrow = {"weight": wide or dtype, "bias": wide or dtype}
    given = {k: v if v is None else v.to(narrow.get(k, dtype)) for k, v in inputs.items()}
    exact = {k: v if v is None else v.double() for k, v in given.items()}
    plain_way = functools.partial(reference, activation=activation, seq_idx=seq_idx)
    truth, plain = outcome(plain_way, exact), outcome(plain_way, given)
    oracle = reference(**exact, activation=activation, seq_idx=seq_idx, conv=causal_conv_numpy)
    truth["y"], truth["final_states"] = oracle
    there = {k: v if v is None else v.to(device) for k, v in given.items()}
    function = functools.partial(
        causal_conv1d_fn, activation=activation, return_final_states=True, backend=backend,
        seq_idx=None if seq_idx is None else seq_idx.to(device),
    )  # fmt: skip
    got, limits = outcome(function, there), bounds(plain, truth)
    rows = [Row(name, *errors(got[name], truth[name]), limits[name]) for name in truth]
    assert all(row.ok for row in rows), "\n".join(str(row) for row in rows)
    assert {k: (v.dtype, v.shape) for k, v in got.items()} == {
        k: (v.dtype, v.shape) for k, v in plain.items()
    }
