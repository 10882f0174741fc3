"""The fused backends as PyTorch operators, so that autograd, torch.compile and fake tensors know them.

An operator's dispatch costs more host time than a small scan takes on a GPU: plain eager calls on plain
tensors go through `torch.autograd.Function` to the same kernels.
"""

import functools
import importlib

import torch
from torch import Tensor

_ROOMS = {"numba": "numba_scan", "triton": "triton_scan", "cuda": "cuda_scan"}


@functools.cache
def _room(backend):
    return importlib.import_module(f"{__package__}.{_ROOMS[backend]}")


def fused_scan(args, ordered, keep, backend):
    """(y, last_state) of :class:`Arguments` on a fused backend, differentiable in every tensor of them."""
    if (
        torch.compiler.is_compiling()
        or type(args.u) not in _PLAIN
        or torch._C._functorch.peek_interpreter_stack()
    ):
        return scan(*args, ordered, keep, backend)[:2]
    if keep:
        return _apply(*args, ordered, backend)
    return _room(backend).forward(*args, False)[:2]


_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *args, ctx.ordered, ctx.backend = inputs
        *tensors, ctx.softplus, ctx.varlen, ctx.rows = args
        y, last_state, states = _room(ctx.backend).forward(*args, True)
        ctx.save_for_backward(*tensors, states)
        ctx.set_materialize_grads(False)
        return y, last_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq, states = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else dy
        if dlast is None and ctx.backend != "cuda":
            dlast = A.new_zeros(ctx.rows, *A.shape)
        grads = _room(ctx.backend).backward(
            dy, dlast, u, delta, A, B, C, D, z, delta_bias, seq, ctx.softplus, ctx.varlen, ctx.rows, states,
            initial_state, ctx.ordered or torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return (*grads, None, None, None, None, None, None)


# As _Scan.apply, which first looks for what fused_scan has ruled out.
_apply = super(torch.autograd.Function, _Scan).apply


@torch.library.custom_op("mamba_fast::selective_scan", mutates_args=())
def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, seq: Tensor | None,
    softplus: bool, varlen: bool, rows: int, ordered: bool, keep: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, last_state, states at chunk boundaries) of normalised arguments on a fused backend."""
    return _room(backend).forward(
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq, softplus, varlen, rows, keep
    )


@scan.register_fake
def _(
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq, softplus, varlen, rows, ordered, keep, backend
):
    chunks = -(-u.shape[2] // _room(backend).CHUNK) if keep else 0
    last = A.new_empty(rows, *A.shape)
    return torch.empty_like(u), last, A.new_empty(u.shape[0], chunks, *A.shape)


@torch.library.custom_op("mamba_fast::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, seq: Tensor | None, softplus: bool, varlen: bool, rows: int,
    states: Tensor, initial_state: Tensor | None, ordered: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    """du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state; empty where the input is absent."""
    grads = _room(backend).backward(
        dy, dlast, u, delta, A, B, C, D, z, delta_bias, seq, softplus, varlen, rows, states, initial_state,
        ordered,
    )  # fmt: skip
    taken, apart = set(), []
    for g in grads:  # what an operator returns may not share memory
        g = u.new_empty(0) if g is None else g
        memory = g.untyped_storage().data_ptr()
        apart.append(g.clone() if memory in taken else g)
        taken.add(memory)
    return apart


@scan_backward.register_fake
def _(
    dy, dlast, u, delta, A, B, C, D, z, delta_bias, seq, softplus, varlen, rows, states, initial_state,
    ordered, backend,
):  # fmt: skip
    dz = u.new_empty(0) if z is None else torch.empty_like(z)
    A, B, C, D, bias, initial = (
        u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (A, B, C, D, delta_bias, initial_state)
    )
    return [torch.empty_like(u), torch.empty_like(delta), A, B, C, D, dz, bias, initial]


def _setup(ctx, inputs, output):
    *tensors, softplus, varlen, rows, ordered, _, backend = inputs
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq = tensors
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, seq, output[2], initial_state)
    ctx.settings = (softplus, varlen, rows, ordered, backend)


def _backward(ctx, dy, dlast, _):
    u, delta, A, B, C, D, z, delta_bias, seq, states, initial_state = ctx.saved_tensors
    softplus, varlen, rows, ordered, backend = ctx.settings
    grads = scan_backward(
        dy, dlast, u, delta, A, B, C, D, z, delta_bias, seq, softplus, varlen, rows, states, initial_state,
        ordered or torch.are_deterministic_algorithms_enabled(), backend,
    )  # fmt: skip
    present = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    grads = [None if x is None else g for x, g in zip(present, grads, strict=True)]
    return (*grads, None, None, None, None, None, None, None)


scan.register_autograd(_backward, setup_context=_setup)
