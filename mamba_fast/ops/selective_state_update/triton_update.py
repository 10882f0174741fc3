"""One step of the recurrence in Triton: every state is read once and written once.

A program holds BLOCK_P channels with all their N states in registers, and what belongs to these channels
alone. It walks over some of the sequences; the next one's numbers are on their way from memory while this
one's are worked on.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mamba_fast.ops.rooms import multiprocessors, on_device_of
from mamba_fast.ops.selective_scan.triton_tiles import sigmoid, softplus


class _Tile(NamedTuple):
    """States a program, states a thread, and the programs a multiprocessor from which it is taken."""

    states: int
    thread: int
    enough: int


_TILES = (_Tile(1024, 8, 36), _Tile(512, 16, 9), _Tile(512, 4, 0))  # much work, some, little
_PROGRAMS_A_MULTIPROCESSOR = 9  # of the first, side by side; these walk
LOG2E = tl.constexpr(1.4426950408889634)


def update(state, x, dt, A, B, C, D, z, dt_bias, softplus, indices):
    """y like x; state (S, P, N) or (S, H, P, N) is updated in place."""
    heads, channels, d_state = (1, *A.shape)[-3:]
    batch = x.shape[0]
    tied = A.stride(-1) == A.stride(-2) == dt.stride(-1) == 0
    tied = tied and (dt_bias is None or dt_bias.stride(-1) == 0)
    block_n = _power_of_2(d_state)
    block_p, walk, warps = _plan(batch, heads, channels, block_n, multiprocessors(x))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid = (-(-channels // block_p) * heads * -(-batch // walk),)
    with on_device_of(x):
        update_kernel[grid](
            state, x, dt, A, B, C, D, z, dt_bias, indices, y,
            _strides(state, 4), _strides(x, 3), _strides(dt, 3), _strides(A, 3, True), _strides(B, 3),
            _strides(C, 3), _strides(D, 2, True), _strides(z, 3), _strides(dt_bias, 2, True),
            batch, heads, channels, heads // (B.shape[1] if B.dim() == 3 else 1),
            heads // (C.shape[1] if C.dim() == 3 else 1), walk,
            N=d_state, SOFTPLUS=softplus, TIED=tied, WALKS=walk > 1, BLOCK_P=block_p, BLOCK_N=block_n,
            num_warps=warps,
        )  # fmt: skip
    return y


@functools.lru_cache(maxsize=1024)
def _plan(batch, heads, channels, block_n, processors):
    """(BLOCK_P, sequences a program, warps) for `processors` multiprocessors."""
    for tile in _TILES:
        block_p = max(1, min(tile.states // block_n, _power_of_2(channels)))
        blocks = heads * -(-channels // block_p)
        if batch * blocks >= tile.enough * processors:
            break
    warps = max(1, min(16, block_p * block_n // (32 * tile.thread)))
    together = _PROGRAMS_A_MULTIPROCESSOR * processors

    def steps(groups):  # one after another on a multiprocessor; a program's own numbers count as one more
        return -(-groups * blocks // together) * (-(-batch // groups) + 1)

    groups = min(range(1, batch // 2 + 1), key=steps, default=1) if tile is _TILES[0] else batch
    return block_p, -(-batch // groups), warps


def _power_of_2(size):
    """The next one; Triton's own function takes as long as PyTorch needs to allocate y."""
    return 1 << (size - 1).bit_length()


def _strides(tensor, dims, parameter=False):
    """Strides with a head (B, C: a group) axis, of stride 0 where the tensor has none."""
    if tensor is None:
        return (0,) * dims
    strides = tensor.stride()
    if len(strides) == dims:
        return strides
    return (0, *strides) if parameter else (strides[0], 0, *strides[1:])


@triton.jit
def update_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, indices_ptr, y_ptr,
    state_strides, x_strides, dt_strides, A_strides, B_strides, C_strides, D_strides, z_strides, bias_strides,
    batch, heads, channels, B_span, C_span, walk,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, TIED: tl.constexpr, WALKS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h = exp(Δ A) h + Δ B x in place, y = (C h + D x) SiLU(z), for BLOCK_P channels of `walk` sequences."""
    blocks = tl.cdiv(channels, BLOCK_P)
    pid = tl.program_id(0)
    h, first = tl.cast((pid // blocks) % heads, tl.int64), (pid // (blocks * heads)) * walk
    p, n = tl.cast(pid % blocks, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p = p < channels
    mask = mask_p[:, None] & (n < N)[None, :]
    state_ptrs = (
        state_ptr + h * state_strides[1] + p[:, None] * state_strides[2] + n[None, :] * state_strides[3]
    )
    x_ptrs, z_ptrs = x_ptr + h * x_strides[1] + p * x_strides[2], z_ptr
    if z_ptr is not None:
        z_ptrs = z_ptr + h * z_strides[1] + p * z_strides[2]
    # B and C are read at the places of the state: the cache serves that, and nothing moves between threads.
    B_ptrs = B_ptr + h // B_span * B_strides[1] + (n * B_strides[2])[None, :]
    C_ptrs = C_ptr + h // C_span * C_strides[1] + (n * C_strides[2])[None, :]
    y_ptrs, y_stride = y_ptr + h * channels + p, tl.cast(heads, tl.int64) * channels
    dt_ptrs, mask_dt = dt_ptr + h * dt_strides[1], True
    if TIED:  # one Δ and one A a head: one exponential a sequence
        A = tl.load(A_ptr + h * A_strides[0]).to(tl.float32) * LOG2E
    else:
        dt_ptrs, mask_dt = dt_ptrs + p * dt_strides[2], mask_p
        A_ptrs = A_ptr + h * A_strides[0] + p[:, None] * A_strides[1] + n[None, :] * A_strides[2]
        A = tl.load(A_ptrs, mask=mask, other=0.0).to(tl.float32) * LOG2E
    bias = _of_channels(bias_ptr, h, p, bias_strides, mask_p, TIED)
    D = _of_channels(D_ptr, h, p, D_strides, mask_p, False)
    end, nowhere = tl.minimum(batch, first + walk), tl.zeros((BLOCK_P, BLOCK_N), tl.int32)
    row, now = _read(first, end, state_ptrs, x_ptrs, dt_ptrs, z_ptrs, indices_ptr, state_strides, x_strides,
                     dt_strides, z_strides, mask, mask_p, mask_dt)  # fmt: skip
    for b in range(first, end):
        this = row
        state, x, Delta, z = now
        wide = tl.cast(b, tl.int64)
        B = tl.load(B_ptrs + wide * B_strides[0] + nowhere, mask=mask & (this >= 0), other=0.0)
        C = tl.load(C_ptrs + wide * C_strides[0] + nowhere, mask=mask & (this >= 0), other=0.0)
        if WALKS:
            row, now = _read(b + 1, end, state_ptrs, x_ptrs, dt_ptrs, z_ptrs, indices_ptr, state_strides,
                             x_strides, dt_strides, z_strides, mask, mask_p, mask_dt)  # fmt: skip
        x, Delta = x.to(tl.float32), Delta.to(tl.float32) + bias
        if SOFTPLUS:
            Delta = softplus(Delta)
        decay = tl.exp2((Delta if TIED else Delta[:, None]) * A)
        state = decay * state.to(tl.float32) + (Delta * x)[:, None] * B.to(tl.float32)
        rounded = state.to(state_ptr.dtype.element_ty)
        tl.store(state_ptrs + this * state_strides[0], rounded, mask=mask & (this >= 0))
        y = tl.sum(state * C.to(tl.float32), axis=1) + x * D
        if z_ptr is not None:
            z = z.to(tl.float32)
            y *= z * sigmoid(z)
        y = tl.where(this >= 0, y, 0.0)  # padding: nothing is read, 0 is written
        tl.store(y_ptrs + wide * y_stride, y.to(y_ptr.dtype.element_ty), mask=mask_p)


@triton.jit
def _read(
    b, end, state_ptrs, x_ptrs, dt_ptrs, z_ptrs, indices_ptr, state_strides, x_strides, dt_strides, z_strides,
    mask, mask_p, mask_dt,
):  # fmt: skip
    """The row of sequence b in `state`, -1 for padding or b == end; the state, x, dt and z of it."""
    b = tl.cast(b, tl.int64)
    row = b
    if indices_ptr is not None:
        row = tl.load(indices_ptr + b, mask=b < end, other=-1).to(tl.int64)
    row = tl.where(b < end, row, -1)
    live = row >= 0
    state = tl.load(state_ptrs + row * state_strides[0], mask=mask & live, other=0.0)
    x = tl.load(x_ptrs + b * x_strides[0], mask=mask_p & live, other=0.0)
    dt = tl.load(dt_ptrs + b * dt_strides[0], mask=mask_dt & live, other=0.0)
    z = x
    if z_ptrs is not None:
        z = tl.load(z_ptrs + b * z_strides[0], mask=mask_p & live, other=0.0)
    return row, (state, x, dt, z)


@triton.jit
def _of_channels(ptr, h, p, strides, mask_p, TIED: tl.constexpr):
    """D or dt_bias, (BLOCK_P,), or one number if TIED; 0 if absent."""
    if ptr is None:
        value = 0.0
    elif TIED:
        value = tl.load(ptr + h * strides[0]).to(tl.float32)
    else:
        value = tl.load(ptr + h * strides[0] + p * strides[1], mask=mask_p, other=0.0).to(tl.float32)
    return value
