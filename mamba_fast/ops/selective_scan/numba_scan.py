"""The selective scan as one fused loop on a CPU: exact float32 states, parallel over sequences and channels.

Per LANES channels and CHUNK steps everything stays in a core's own caches; main memory is read and
written once. The forward keeps the state at chunk starts only, B D N L / CHUNK numbers.
"""

import math
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import torch

from mamba_fast.ops.selective_scan.arguments import is_constant
from mamba_fast.ops.selective_scan.numba_backward import scan_backward
from mamba_fast.ops.selective_scan.numba_forward import scan_forward
from mamba_fast.ops.selective_scan.numba_math import CHUNK, LANES

__all__ = ["CHUNK", "backward", "forward"]

_TASKS = 64  # backward tasks to aim at; fixed, so that sums have one order on every machine
_one_at_a_time = threading.Lock()  # numba's fallback threading layer is not safe for two callers


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq, softplus, varlen, rows, keep):
    """y (B, D, L), last_state (rows, D, N), states (B, chunks, D, N) entering each chunk."""
    batch, _, seqlen = u.shape
    table = A.new_zeros(rows, *A.shape) if initial_state is None else initial_state
    chunks = -(-seqlen // CHUNK) if keep else 0
    y = _empty(u.shape)
    last = table.clone(memory_format=torch.contiguous_format)  # an empty sequence keeps its state
    states = _empty(batch, chunks, *A.shape)
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias, table)
    flags = (softplus, z is not None, seq is not None, varlen, is_constant(B, u), is_constant(C, u))
    with _one_at_a_time:
        _prepare("scan_forward")
        scan_forward(*inputs, *_edges(u, seq, varlen), _span(u, B, C), *flags, keep,
                     y.numpy(), last.numpy(), states.numpy())  # fmt: skip
    return _as(y, u), last, states


def backward(
    dy, dlast, u, delta, A, B, C, D, z, delta_bias, seq, softplus, varlen, rows, states, initial_state,
    ordered, dz=None, y=None,
):  # fmt: skip
    """Every gradient, in the order u, delta, A, B, C, D, z, delta_bias, initial_state; None if absent.

    The order of the additions never varies: `ordered` changes nothing. That of z is written into `dz` if it
    is given, and beside z the forward's y into `y` (B, D, L) of u's type, any strides.
    """
    (batch, d_inner, seqlen), d_state = u.shape, A.shape[1]
    table = A.new_zeros(rows, *A.shape) if initial_state is None else initial_state
    span = _span(u, B, C)
    spans = d_inner // span
    pieces = min(-(-span // LANES), -(-_TASKS // (batch * spans)))
    du, ddelta, dgate = (_empty(u.shape) for _ in range(3))
    gated = _empty(u.shape if y is not None else (0, 0, 0))
    dA, dB_constant, dC_constant = (_empty(batch, d_inner, d_state) for _ in range(3))
    dB, dC = (_empty(batch, spans, pieces, d_state, seqlen).zero_() for _ in range(2))
    dD, dbias = _empty(batch, d_inner), _empty(batch, d_inner)
    dtable = dlast.float().clone(memory_format=torch.contiguous_format)  # that of an empty sequence
    outputs = (du, ddelta, dA, dB, dC, dB_constant, dC_constant, dD, dgate, gated, dbias, dtable)
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias, table)
    flags = (softplus, z is not None, seq is not None, varlen, is_constant(B, u), is_constant(C, u))
    with _one_at_a_time:
        _prepare("scan_backward")
        scan_backward(_array(dy), _array(dlast), *inputs, states.numpy(), *_edges(u, seq, varlen), span,
        pieces,
                      *flags, *(t.numpy() for t in outputs))  # fmt: skip

    def matrix(v, steps, constant):
        if is_constant(v, u):
            return constant.sum(0)[None, :, :, None]
        return steps.sum(2).unflatten(1, (v.shape[1], -1)).sum(2).to(v.dtype)

    if z is not None:
        dz = _as(dgate, z) if dz is None else dz.copy_(dgate)
        if y is not None:
            y.copy_(gated)
    return (
        _as(du, u), _as(ddelta, delta), dA.sum(0), matrix(B, dB, dB_constant), matrix(C, dC, dC_constant),
        None if D is None else dD.sum(0), dz,
        None if delta_bias is None else dbias.sum(0), None if initial_state is None else dtable,
    )  # fmt: skip


def _inputs(u, delta, A, B, C, D, z, delta_bias, table):
    """Contiguous float32 arrays; an absent D or delta_bias is zero, an absent z is never read.

    D and delta_bias are copied: they can be parameters, and memory that NumPy has seen is never freed, which
    a sharded model wants to do with its parameters.
    """
    none = _empty(u.shape[1]).zero_()
    D, delta_bias = (none if v is None else v.clone() for v in (D, delta_bias))
    return tuple(_array(v) for v in (u, delta, A, B, C, D, u if z is None else z, delta_bias, table))


def _empty(*size):
    """Float32 on the CPU, whatever torch's default type and device are."""
    return torch.empty(*size, dtype=torch.float32, device="cpu")


def _array(tensor):
    return tensor.detach().to(torch.float32).contiguous().numpy()


def _as(result, like):
    """A float32 result in the type and the memory layout of the tensor it belongs to."""
    return (
        result
        if result.dtype == like.dtype and like.is_contiguous()
        else torch.empty_like(like).copy_(result)
    )


def _span(u, B, C):
    """The number of neighbouring channels that share their groups of B and of C."""
    widths = [u.shape[1] // v.shape[1] for v in (B, C) if not is_constant(v, u)]
    return math.gcd(*widths) if widths else u.shape[1]


def _edges(u, seq, varlen):
    """start, end (B, L) bool and row (B, L) int32 of the packed sequences; row -1: no row of the tables."""
    batch, _, seqlen = u.shape
    start, end = np.zeros((batch, seqlen), np.bool_), np.zeros((batch, seqlen), np.bool_)
    row = np.full((batch, seqlen), -1, np.int32)
    if seq is not None:
        index = seq.numpy()
        start[:, 1:] = index[:, 1:] != index[:, :-1]
        end[:, :-1] = start[:, 1:]
        if varlen:
            start[:, 0], end[:, -1], row = True, True, np.ascontiguousarray(index)
    return start, end, row


def _prepare(kernel):
    """Use PyTorch's number of threads; say so on a terminal if the kernel is about to be compiled."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    cached = any((Path(__file__).parent / "__pycache__").glob(f"numba_*.{kernel}-*.nbi"))
    if not cached and kernel not in _announced and sys.stderr.isatty():
        print(f"mamba_fast: compiling {kernel} for this CPU, once, about ten seconds", file=sys.stderr)
    _announced.add(kernel)


_announced = set()
