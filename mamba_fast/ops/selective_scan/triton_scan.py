"""The selective scan in Triton: any GPU Triton supports, and a CPU through its interpreter.

One program holds BLOCK_D channels and walks over tiles of BLOCK_L steps. Where there are too few
channels to fill the chip every tile gets a program of its own: `tile_summary_kernel` finds what a
tile hands to its neighbour, `chain_kernel` chains these, and the tiles then start from the result.
"""

import math
from typing import NamedTuple

import torch
import triton

from mamba_fast.ops.selective_scan.arguments import is_constant
from mamba_fast.ops.selective_scan.backends import interpreted
from mamba_fast.ops.selective_scan.triton_backward import scan_backward_kernel
from mamba_fast.ops.selective_scan.triton_forward import (
    chain_kernel,
    scan_forward_kernel,
    tile_summary_kernel,
)

__all__ = ["CHUNK", "backward", "forward"]

CHUNK = 32 if interpreted() else 256  # steps between saved states
_BLOCK_D, _WARPS = 2, 1  # a row of 256 steps is 8 a lane: no data crosses warps
_FORWARD_REGISTERS, _BACKWARD_REGISTERS = 128, 168  # a thread: more warps fit, and loads wait less
_PROGRAMS_A_MULTIPROCESSOR = 32  # fewer leave the chip idle, and the sequence is split


class _Plan(NamedTuple):
    """How a call is cut: tiles of (block_d, block_l) and how many of them a program walks over."""

    batch: int
    channels: int
    block_d: int
    block_l: int
    tiles: int
    tiles_per_program: int

    @property
    def split(self):
        return self.tiles_per_program < self.tiles

    @property
    def blocks(self):
        return -(-self.channels // self.block_d)

    @property
    def grid(self):
        return (self.batch * self.blocks * -(-self.tiles // self.tiles_per_program),)


def _plan(u, B, C):
    batch, channels, seqlen = u.shape
    groups = [v.shape[1] for v in (B, C) if not is_constant(v, u)]
    span = math.gcd(*(channels // g for g in groups)) if max(groups, default=1) > 1 else 0
    block_d = min(_BLOCK_D, triton.next_power_of_2(channels))
    while span % block_d:  # the channels of a program share their groups of B and C
        block_d //= 2
    block_l = min(CHUNK, max(16, triton.next_power_of_2(seqlen)))
    tiles = -(-seqlen // block_l)
    programs = batch * -(-channels // block_d)
    multiprocessors = torch.cuda.get_device_properties(u.device).multi_processor_count if u.is_cuda else 1
    split = tiles > 2 and programs < _PROGRAMS_A_MULTIPROCESSOR * multiprocessors
    return _Plan(batch, channels, block_d, block_l, tiles, 1 if split else tiles)


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq, softplus, varlen, rows, keep):
    """y (B, D, L), last_state (rows, D, N), states (B, tiles, D, N) entering each tile."""
    (batch, channels, seqlen), N = u.shape, A.shape[1]
    plan = _plan(u, B, C)
    D, delta_bias, table = (None if v is None else v.contiguous() for v in (D, delta_bias, initial_state))
    y = torch.empty_like(u)
    last = (
        A.new_zeros(rows, channels, N) if table is None else table.clone()
    )  # an empty sequence keeps its state
    states = A.new_empty(batch, plan.tiles, channels, N)
    first = None if varlen else table
    if plan.split:
        states = _enter_tiles(
            plan, u, delta, A, B, None, delta_bias, first, table, seq, softplus, varlen, False
        )
    else:
        states[:, 0] = 0 if first is None else first
    scan_forward_kernel[plan.grid](
        u, delta, A, B, C, D, z, delta_bias, table, seq, y, last, states,
        u.stride(), delta.stride(), A.stride(), B.stride(), C.stride(), _strides(z), y.stride(),
        channels, seqlen, plan.tiles, plan.tiles_per_program, channels // B.shape[1], channels // C.shape[1],
        **_switches(D, z, delta_bias, table, seq, softplus, varlen, B, C, u, N, plan),
        maxnreg=_FORWARD_REGISTERS,
    )  # fmt: skip
    return y, last, states if keep else states.new_empty(batch, 0, channels, N)


def backward(
    dy, dlast, u, delta, A, B, C, D, z, delta_bias, seq, softplus, varlen, rows, states, initial_state,
    ordered, dz=None, y=None,
):  # fmt: skip
    """Every gradient, in the order u, delta, A, B, C, D, z, delta_bias, initial_state; None if absent.

    That of z is written into `dz` if it is given, and beside z the forward's y into `y` (B, D, L) of u's
    type, any strides.
    """
    (_, channels, seqlen), N = u.shape, A.shape[1]
    plan = _plan(u, B, C)
    D, delta_bias, table = (None if v is None else v.contiguous() for v in (D, delta_bias, initial_state))
    dlast = dlast.contiguous()
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = torch.empty_like(z) if dz is None and z is not None else dz
    dA, dbias, dD = (
        states.new_empty(states.shape),
        states.new_empty(states.shape[:3]),
        states.new_empty(states.shape[:3]),
    )
    slots = plan.blocks if ordered else 1
    dB, dC = (
        states.new_empty(states.shape) if is_constant(v, u) else states.new_zeros(slots, *v.shape)
        for v in (B, C)
    )
    dtable = dlast.clone()  # that of an empty sequence
    last_flow = None if varlen else dlast
    if plan.split:
        flows = _enter_tiles(
            plan, dy, delta, A, C, z, delta_bias, last_flow, dlast, seq, softplus, varlen, True
        )
    else:
        flows = torch.empty_like(states)
        flows[:, -1] = 0 if varlen else dlast
    y_strides = None if y is None else y.stride()  # None takes no register
    scan_backward_kernel[plan.grid](
        u, delta, A, B, C, D, z, delta_bias, table, seq, dy, dlast, states, flows,
        du, ddelta, dz, y, dA, dB, dC, dD, dbias, dtable,
        u.stride(), delta.stride(), A.stride(), B.stride(), C.stride(), _strides(z), dy.stride(), du.stride(),
        ddelta.stride(), _strides(dz), y_strides, dB.stride(), dC.stride(), channels, seqlen, plan.tiles,
        plan.tiles_per_program,
        channels // B.shape[1], channels // C.shape[1], slots,
        **_switches(D, z, delta_bias, table, seq, softplus, varlen, B, C, u, N, plan),
        maxnreg=_BACKWARD_REGISTERS,
    )  # fmt: skip

    def matrix(v, grad):
        return grad.sum((0, 1))[None, :, :, None] if is_constant(v, u) else grad.sum(0).to(v.dtype)

    return (
        du, ddelta, dA.sum((0, 1)), matrix(B, dB), matrix(C, dC), None if D is None else dD.sum((0, 1)), dz,
        None if delta_bias is None else dbias.sum((0, 1)), None if initial_state is None else dtable,
    )  # fmt: skip


def _enter_tiles(plan, x, delta, A, M, gate, delta_bias, edge, table, seq, softplus, varlen, reverse):
    """(B, tiles, D, N): the state entering a tile from its left or, with reverse, the flow from its right."""
    (batch, channels, seqlen), N = x.shape, A.shape[1]
    local = A.new_empty(batch, plan.tiles, channels, N)
    total, carry = A.new_empty(local.shape[:3]), torch.empty_like(local)
    edge = local.new_zeros(batch, channels, N) if edge is None else edge
    tile_summary_kernel[plan._replace(tiles_per_program=1).grid](
        delta, delta_bias, A, x, gate, M, table, seq, local, total,
        delta.stride(), A.stride(), x.stride(), _strides(gate), M.stride(), channels, seqlen, plan.tiles,
        channels // M.shape[1], N=N, HAS_BIAS=delta_bias is not None, HAS_GATE=gate is not None,
        HAS_TABLE=table is not None, SOFTPLUS=softplus, PACKED=seq is not None, VARLEN=varlen,
        M_CONSTANT=is_constant(M, x), REVERSE=reverse, BLOCK_D=plan.block_d, BLOCK_L=plan.block_l,
        num_warps=_WARPS,
    )  # fmt: skip
    cut = None if seq is None else _cut(seq, varlen, reverse, plan)
    block = 128
    chain_kernel[(batch * triton.cdiv(channels * N, block),)](
        A, total, cut, local, carry, edge, A.stride(), channels, plan.tiles,
        N=N, PACKED=seq is not None, REVERSE=reverse, BLOCK=block, num_warps=1,
    )  # fmt: skip
    return carry


def _cut(seq, varlen, reverse, plan):
    """(B, tiles) int32: a packed sequence starts (with reverse: ends) in the tile."""
    change = seq.new_full((seq.shape[0], seq.shape[1] + 1), int(varlen))
    change[:, 1:-1] = seq[:, 1:] != seq[:, :-1]
    change = change[:, 1:] if reverse else change[:, :-1]
    change = torch.nn.functional.pad(change, (0, plan.tiles * plan.block_l - seq.shape[1]))
    return change.unflatten(1, (plan.tiles, plan.block_l)).amax(-1)


def _switches(D, z, delta_bias, table, seq, softplus, varlen, B, C, u, N, plan):
    """The compile-time arguments of the main kernels."""
    return {
        "N": N, "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": delta_bias is not None,
        "HAS_TABLE": table is not None, "SOFTPLUS": softplus, "PACKED": seq is not None, "VARLEN": varlen,
        "B_CONSTANT": is_constant(B, u), "C_CONSTANT": is_constant(C, u), "BLOCK_D": plan.block_d,
        "BLOCK_L": plan.block_l, "num_warps": _WARPS,
    }  # fmt: skip


def _strides(tensor):
    return (0, 0, 0) if tensor is None else tensor.stride()
