"""The fused backends as PyTorch operators, so that autograd, torch.compile and fake tensors know them."""

import importlib

import torch
from torch import Tensor

_ROOMS = {"numba": "numba_scan", "triton": "triton_scan"}


def _room(backend):
    return importlib.import_module(f"{__package__}.{_ROOMS[backend]}")


@torch.library.custom_op("mamba_fast::selective_scan", mutates_args=())
def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, seq: Tensor | None,
    softplus: bool, varlen: bool, rows: int, keep: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, last_state, states at chunk boundaries) of normalised arguments on a fused backend."""
    return _room(backend).forward(
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq, softplus, varlen, rows, keep
    )


@scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, seq, softplus, varlen, rows, keep, backend):
    chunks = -(-u.shape[2] // _room(backend).CHUNK) if keep else 0
    last = A.new_empty(rows, *A.shape)
    return torch.empty_like(u), last, A.new_empty(u.shape[0], chunks, *A.shape)


@torch.library.custom_op("mamba_fast::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, seq: Tensor | None, softplus: bool, varlen: bool, rows: int,
    states: Tensor, initial_state: Tensor | None, backend: str,
) -> list[Tensor]:  # fmt: skip
    """du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state; empty where the input is absent."""
    grads = _room(backend).backward(
        dy, dlast, u, delta, A, B, C, D, z, delta_bias, seq, softplus, varlen, rows, states, initial_state
    )
    return [u.new_empty(0) if g is None else g for g in grads]


@scan_backward.register_fake
def _(
    dy,
    dlast,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    seq,
    softplus,
    varlen,
    rows,
    states,
    initial_state,
    backend,
):
    like = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [u.new_empty(0) if x is None else torch.empty_like(x) for x in like]


def _setup(ctx, inputs, output):
    *tensors, softplus, varlen, rows, _, backend = inputs
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq = tensors
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, seq, output[2], initial_state)
    ctx.settings = (softplus, varlen, rows, backend)


def _backward(ctx, dy, dlast, _):
    u, delta, A, B, C, D, z, delta_bias, seq, states, initial_state = ctx.saved_tensors
    softplus, varlen, rows, backend = ctx.settings
    grads = scan_backward(
        dy,
        dlast,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        seq,
        softplus,
        varlen,
        rows,
        states,
        initial_state,
        backend,
    )
    present = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    grads = [None if x is None else g for x, g in zip(present, grads, strict=True)]
    return (*grads, None, None, None, None, None, None)


scan.register_autograd(_backward, setup_context=_setup)
