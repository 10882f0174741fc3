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
from mamba_fast.ops.triton_chain import early, meet
from mamba_fast.ops.triton_launch import Launch, looks, named


class _Tile(NamedTuple):
    """States a program, states a thread, and the programs a multiprocessor from which it is taken."""

    states: int
    thread: int
    enough: int


_TILES = (_Tile(1024, 8, 36), _Tile(512, 16, 9), _Tile(512, 4, 0))  # much work, some, little
_PROGRAMS_A_MULTIPROCESSOR = 9  # of the first, side by side; these walk
_MOST_GROUPS = 65535  # programs along the third axis of a grid
LOG2E = tl.constexpr(1.4426950408889634)


def update(state, x, dt, A, B, C, D, z, dt_bias, softplus, indices):
    """y like x; state (S, P, N) or (S, H, P, N) is updated in place."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    indices = None if indices is None else indices.contiguous()
    given = state, x, dt, A, B, C, D, z, dt_bias, indices, y
    with on_device_of(x):
        _launch(looks(*given), softplus, x.device)(*given)
    return y


@functools.lru_cache(maxsize=1024)
def _launch(looks, softplus, device):
    state, x, dt, A, B, C, D, z, dt_bias, _, _ = named(looks)
    heads, channels, d_state = (1, *A.shape)[-3:]
    batch = x.shape[0]
    tied = A.strides[-1] == A.strides[-2] == dt.strides[-1] == 0
    tied = tied and (dt_bias is None or dt_bias.strides[-1] == 0)
    block_n = triton.next_power_of_2(d_state)
    processors = multiprocessors(torch.empty(0, device=device))
    block_p, walk, warps = _plan(batch, heads, channels, block_n, processors)
    grid = heads, -(-channels // block_p), -(-batch // walk)
    return Launch(
        update_kernel, grid,
        _strides(state, 4), _strides(x, 3), _strides(dt, 3), _strides(A, 3, True), _strides(B, 3),
        _strides(C, 3), _strides(D, 2, True), _strides(z, 3), _strides(dt_bias, 2, True),
        batch, channels, heads // (B.shape[1] if len(B.shape) == 3 else 1),
        heads // (C.shape[1] if len(C.shape) == 3 else 1), walk,
        N=d_state, SOFTPLUS=softplus, TIED=tied, WALKS=walk > 1, BLOCK_P=block_p, BLOCK_N=block_n,
        num_warps=warps, **early(device),
    )  # fmt: skip


def _plan(batch, heads, channels, block_n, processors):
    """(BLOCK_P, sequences a program, warps) for `processors` multiprocessors."""
    for tile in _TILES:
        block_p = max(1, min(tile.states // block_n, triton.next_power_of_2(channels)))
        blocks = heads * -(-channels // block_p)
        if batch * blocks >= tile.enough * processors:
            break
    warps = max(1, min(16, block_p * block_n // (32 * tile.thread)))
    together = _PROGRAMS_A_MULTIPROCESSOR * processors

    def steps(groups):  # one after another on a multiprocessor; a program's own numbers count as one more
        return -(-groups * blocks // together) * (-(-batch // groups) + 1)

    groups = min(range(1, batch // 2 + 1), key=steps, default=1) if tile is _TILES[0] else batch
    return block_p, -(-batch // min(groups, _MOST_GROUPS)), warps


def _strides(look, dims, parameter=False):
    """Strides with a head (B, C: a group) axis, of stride 0 where the tensor has none."""
    if look is None:
        return (0,) * dims
    strides = look.strides
    if len(strides) == dims:
        return strides
    return (0, *strides) if parameter else (strides[0], 0, *strides[1:])


@triton.jit
def update_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, indices_ptr, y_ptr,
    state_strides, x_strides, dt_strides, A_strides, B_strides, C_strides, D_strides, z_strides, bias_strides,
    batch, channels, B_span, C_span, walk,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, TIED: tl.constexpr, WALKS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = exp(Δ A) h + Δ B x in place, y = (C h + D x) SiLU(z), for BLOCK_P channels of `walk` sequences."""
    meet(PDL)
    h = tl.program_id(0).to(tl.int64)
    p, n = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p = p < channels
    mask = mask_p[:, None] & (n < N)[None, :]
    state_ptrs = (
        state_ptr + h * state_strides[1] + p[:, None] * state_strides[2] + n[None, :] * state_strides[3]
    )
    x_ptrs, z_ptrs = x_ptr + h * x_strides[1] + p * x_strides[2], z_ptr
    if z_ptr is not None:
        z_ptrs = z_ptr + h * z_strides[1] + p * z_strides[2]
    # B and C are read at the places of the state: the cache serves that, and nothing moves between threads.
    nowhere = tl.zeros((BLOCK_P, BLOCK_N), tl.int32)
    B_ptrs = B_ptr + h // B_span * B_strides[1] + (n * B_strides[2])[None, :] + nowhere
    C_ptrs = C_ptr + h // C_span * C_strides[1] + (n * C_strides[2])[None, :] + nowhere
    y_ptrs = y_ptr + h * channels + p
    dt_ptrs, mask_dt = dt_ptr + h * dt_strides[1], True
    if TIED:  # one Δ and one A a head: one exponential a sequence
        A = tl.load(A_ptr + h * A_strides[0]).to(tl.float32) * LOG2E
    else:
        dt_ptrs, mask_dt = dt_ptrs + p * dt_strides[2], mask_p
        A_ptrs = A_ptr + h * A_strides[0] + p[:, None] * A_strides[1] + n[None, :] * A_strides[2]
        A = tl.load(A_ptrs, mask=mask, other=0.0).to(tl.float32) * LOG2E
    bias = _of_channels(bias_ptr, h, p, bias_strides, mask_p, TIED)
    D = _of_channels(D_ptr, h, p, D_strides, mask_p, False)
    y_stride = tl.num_programs(0).to(tl.int64) * channels
    if WALKS:
        first = tl.program_id(2) * walk
        end = tl.minimum(batch, first + walk)
        row, now = _read(first, end, state_ptrs, x_ptrs, dt_ptrs, z_ptrs, indices_ptr, state_strides,
                         x_strides, dt_strides, z_strides, mask, mask_p, mask_dt)  # fmt: skip
        for b in range(first, end):
            this, then = row, now
            BC = _read_groups(b, this, B_ptrs, C_ptrs, B_strides, C_strides, mask)
            row, now = _read(b + 1, end, state_ptrs, x_ptrs, dt_ptrs, z_ptrs, indices_ptr, state_strides,
                             x_strides, dt_strides, z_strides, mask, mask_p, mask_dt)  # fmt: skip
            _advance(this, then, BC, A, bias, D, state_ptrs + this * state_strides[0],
                     y_ptrs + tl.cast(b, tl.int64) * y_stride, mask, mask_p, z_ptr is not None, SOFTPLUS,
                     TIED)  # fmt: skip
    else:
        b = tl.program_id(2)
        row, now = _read(b, None, state_ptrs, x_ptrs, dt_ptrs, z_ptrs, indices_ptr, state_strides,
                         x_strides, dt_strides, z_strides, mask, mask_p, mask_dt)  # fmt: skip
        BC = _read_groups(b, row, B_ptrs, C_ptrs, B_strides, C_strides, mask)
        _advance(row, now, BC, A, bias, D, state_ptrs + row * state_strides[0],
                 y_ptrs + tl.cast(b, tl.int64) * y_stride, mask, mask_p, z_ptr is not None, SOFTPLUS,
                 TIED)  # fmt: skip


@triton.jit
def _read(
    b, end, state_ptrs, x_ptrs, dt_ptrs, z_ptrs, indices_ptr, state_strides, x_strides, dt_strides, z_strides,
    mask, mask_p, mask_dt,
):  # fmt: skip
    """The row of sequence b in `state`, -1 for padding or b == end; the state, x, dt and z of it."""
    b = tl.cast(b, tl.int64)
    row = b
    if indices_ptr is not None:
        row = tl.load(indices_ptr + b, mask=True if end is None else b < end, other=-1).to(tl.int64)
    if end is not None:
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
def _read_groups(b, row, B_ptrs, C_ptrs, B_strides, C_strides, mask):
    """B and C of sequence b."""
    b, mask = tl.cast(b, tl.int64), mask & (row >= 0)
    B = tl.load(B_ptrs + b * B_strides[0], mask=mask, other=0.0)
    C = tl.load(C_ptrs + b * C_strides[0], mask=mask, other=0.0)
    return B, C


@triton.jit
def _advance(
    row, now, BC, A, bias, D, state_ptrs, y_ptrs, mask, mask_p, GATED: tl.constexpr, SOFTPLUS: tl.constexpr,
    TIED: tl.constexpr,
):  # fmt: skip
    """One sequence: its state, and its y."""
    state, x, Delta, z = now
    B, C = BC
    x, Delta = x.to(tl.float32), Delta.to(tl.float32) + bias
    if SOFTPLUS:
        Delta = softplus(Delta)
    decay = tl.exp2((Delta if TIED else Delta[:, None]) * A)
    h = decay * state.to(tl.float32) + (Delta * x)[:, None] * B.to(tl.float32)
    tl.store(state_ptrs, h.to(state_ptrs.dtype.element_ty), mask=mask & (row >= 0))
    y = tl.sum(h * C.to(tl.float32), axis=1) + x * D
    if GATED:
        z = z.to(tl.float32)
        y *= z * sigmoid(z)
    y = tl.where(row >= 0, y, 0.0)  # padding: nothing is read, 0 is written
    tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask_p)


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
