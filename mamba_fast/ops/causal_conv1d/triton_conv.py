"""The causal convolution in Triton: any GPU Triton supports, and a CPU through its interpreter.

Which of the two pairs of kernels runs depends on what lies side by side in memory: the time steps of a
channel ("rows"), or the channels of a step ("columns"). Block sizes are a table, not a search.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton

from mamba_fast.ops.causal_conv1d.torch_conv import final_states_torch, in_last_sequence
from mamba_fast.ops.causal_conv1d.triton_backward import (
    conv_columns_backward_kernel,
    conv_parts_kernel,
    conv_rows_backward_kernel,
)
from mamba_fast.ops.causal_conv1d.triton_forward import conv_columns_kernel, conv_rows_kernel
from mamba_fast.ops.causal_conv1d.triton_update import reach_kernel, update, varlen_states
from mamba_fast.ops.rooms import multiprocessors
from mamba_fast.ops.selective_scan.backends import interpreted
from mamba_fast.ops.triton_launch import Launch, looks, named

__all__ = ["backward", "forward", "update", "varlen_states"]


class Blocks(NamedTuple):
    """Numbers of a tile: channels times groups (rows), or times stretches of time (columns).

    Rows: a group is `steps` steps. Columns: a tile has `block_d` channels, a stretch `run` steps, and
    `steps` of them are read at a time. `programs` run side by side on a multiprocessor; with none a program
    of rows has `run` tiles.
    """

    tile: int
    steps: int
    warps: int
    programs: int
    block_d: int = 1
    run: int = 1


BLOCKS = {
    "forward_rows": Blocks(tile=256, steps=8, warps=4, programs=0),
    "forward_columns": Blocks(tile=512, steps=8, warps=4, programs=8, block_d=128, run=32),
    "backward_rows": Blocks(tile=64, steps=16, warps=2, programs=8),
    "backward_long_rows": Blocks(tile=32, steps=16, warps=1, programs=0, run=8),
    "backward_columns": Blocks(tile=256, steps=4, warps=4, programs=7, block_d=128, run=64),
}
_LONG = 32 if interpreted() else 8192  # steps: many more programs than have a place at the same time
if interpreted():  # small tiles and few programs, so that short sequences have several of both
    BLOCKS = {
        name: b._replace(tile=8, programs=min(b.programs, 2))
        if name.endswith("rows")
        else b._replace(tile=16, block_d=4, run=16, programs=2)
        for name, b in BLOCKS.items()
    }


class _Plan(NamedTuple):
    """How a call is cut. A program: block_d channels, and for each of `rows` batch elements `run` tiles of
    block_g groups of `steps` steps (rows), or block_g stretches of `run` steps (columns).
    """

    columns: bool
    block_d: int
    block_g: int
    steps: int
    unit: int
    vec: int
    run: int
    rows: int
    tiles: int  # programs along a sequence
    parts: int  # programs of a channel
    blocks: int  # programs along the channels
    warps: int


def _plan(x, direction, device, *others):
    """Block sizes for the look x; `others` are the strides of the other tensors of its shape."""
    channels, seqlen = x.shape[1:]
    strides = x.strides
    columns = _has_columns(x.shape, strides)
    table = BLOCKS[f"{direction}_{'columns' if columns else 'rows'}"]
    if not columns and seqlen > _LONG:
        table = BLOCKS.get(f"{direction}_long_rows", table)
    together = table.programs * multiprocessors(torch.empty(0, device=device))
    width = 16 // x.dtype.itemsize  # numbers in the widest access of a thread
    if columns:
        vec = math.gcd(width, channels, strides[0], strides[2], *(s for o in others for s in o[::2]))
        return _plan_columns(x, table, together, vec)
    vec = math.gcd(width, seqlen, strides[0], strides[1], *(s for o in others for s in o[:2]))
    return _plan_rows(x, table, together, vec, width)


def _has_columns(shape, strides):
    """Whether the channels of a step lie side by side, and not the steps of a channel."""
    return strides[1] == 1 and (strides[2] != 1 or shape[2] == 1)


def _plan_rows(x, table, together, vec, unit):
    """A program is given as many tiles as leave `together` programs; all of its channels' if it can."""
    batch, channels, seqlen = x.shape
    steps = unit if vec == 1 else max(unit, table.steps * unit // 8)  # number by number takes more registers
    block_g = min(table.tile, _power_of_2(-(-seqlen // steps)))
    block_d = max(table.block_d, min(table.tile // block_g, _power_of_2(channels)))
    tiles, blocks = -(-seqlen // (block_g * steps)), -(-channels // block_d)
    share = max(1, batch * tiles * blocks // together) if together else table.run
    parts = -(-tiles // min(share, tiles))
    run, rows = -(-tiles // parts), max(1, share // tiles)
    tiles, rows = -(-tiles // run), -(-batch // -(-batch // rows))
    return _Plan(
        False,
        block_d,
        block_g,
        steps,
        unit,
        vec,
        run,
        rows,
        tiles,
        tiles * -(-batch // rows),
        blocks,
        table.warps,
    )


def _plan_columns(x, table, together, vec):
    """Stretches near `run` steps, such that the programs fill the chip a whole number of times."""
    batch, channels, seqlen = x.shape
    block_d, steps = min(table.block_d, _power_of_2(channels)), table.steps
    tile = table.tile // 2 if vec == 1 else table.tile  # number by number takes more registers
    block_g = max(1, min(tile // block_d, _power_of_2(-(-seqlen // table.run))))
    blocks = -(-channels // block_d)
    rows = batch * blocks
    rounds = max(1, round(rows * seqlen / (block_g * table.run * together)))
    tiles = max(1, rounds * together // rows)
    run = -(-seqlen // (block_g * tiles * steps)) * steps
    tiles = -(-seqlen // (block_g * run))
    unit = steps if seqlen % steps == 0 else 1
    return _Plan(True, block_d, block_g, steps, unit, vec, run, 1, tiles, tiles * batch, blocks, table.warps)


def _power_of_2(n):
    return 1 << (n - 1).bit_length()


def forward(x, weight, bias, seq_idx, initial_states, silu, want_final, y=None):
    """y (B, D, L) and final states (B, D, W - 1), which are empty if nobody wants them.

    y is written into `y` if that is given, whatever its strides.
    """
    y = torch.empty_like(x) if y is None else y
    bias = None if bias is None else bias.contiguous()
    known = looks(x, weight, bias, initial_states, y)
    launch = _forward_launch(known, seq_idx is not None, silu, x.device)
    launch(x, weight, bias, initial_states, _reach(seq_idx, weight.shape[1]), y)
    if want_final:
        return y, final_states_torch(x, weight.shape[1], seq_idx, initial_states)
    return y, x.new_empty(0)


@functools.lru_cache(maxsize=1024)
def _forward_launch(looks, packed, silu, device):
    x, weight, bias, init, y = named(looks)
    plan = _plan(x, "forward", device, y.strides)
    return Launch(
        conv_columns_kernel if plan.columns else conv_rows_kernel, (plan.parts * plan.blocks,),
        x.strides, weight.strides, _strides(init), y.strides, *x.shape[1:], plan.tiles, plan.blocks, plan.run,
        WIDTH=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, HAS_INIT=init is not None,
        PACKED=packed, STEPS=plan.steps, UNIT=plan.unit, VEC=plan.vec, BLOCK_D=plan.block_d,
        BLOCK_G=plan.block_g, num_warps=plan.warps,
    )  # fmt: skip


def backward(dy, dfinal, x, weight, bias, seq_idx, initial_states, silu, dx=None):
    """dx, dweight, dbias, dinitial_states; None if absent. dfinal is None if nobody wanted final states.

    dx is written into `dx` if that is given; its time steps or channels lie side by side as those of x do.
    """
    dx = torch.empty_like(x) if dx is None else dx
    if dy.stride(1 if _has_columns(x.shape, x.stride()) else 2) != 1:
        dy = torch.empty_like(x).copy_(dy)  # reading across the grain is slower than a copy
    bias = None if bias is None else bias.contiguous()
    dinit = None if initial_states is None else torch.empty_like(initial_states)
    known = looks(x, weight, bias, initial_states, dy, dx, dinit)
    launches = _backward_launches(known, seq_idx is not None, silu, x.device)
    sums = None
    if launches.sums:
        sums = torch.empty(launches.sums, dtype=torch.float32, device=x.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty_like(bias)
    reach = _reach(seq_idx, weight.shape[1])
    launches.main(x, weight, bias, initial_states, reach, dy, dx, sums, dweight, dbias, dinit)
    if launches.sums:
        launches.add_up(sums, dweight, dbias)
    if dfinal is not None:
        _add_final(dx, dinit, dfinal, seq_idx)
    return dx, dweight, dbias, dinit


class _Backward(NamedTuple):
    """The launches of a backward, and the shape of what one hands to the other, if there is a second."""

    main: Launch
    add_up: Launch | None = None
    sums: tuple = ()


@functools.lru_cache(maxsize=1024)
def _backward_launches(looks, packed, silu, device):
    x, weight, bias, init, dy, dx, dinit = named(looks)
    (batch, channels, seqlen), width = x.shape, weight.shape[1]
    plan = _plan(x, "backward", device, dx.strides, dy.strides)
    main = Launch(
        conv_columns_backward_kernel if plan.columns else conv_rows_backward_kernel,
        (plan.parts * plan.blocks,),
        x.strides, weight.strides, _strides(init), dy.strides, dx.strides, _strides(dinit),
        batch, channels, seqlen, plan.tiles, plan.blocks, plan.run, plan.rows,
        WIDTH=width, SILU=silu, HAS_BIAS=bias is not None, HAS_INIT=dinit is not None,
        PACKED=packed, DIRECT=plan.parts == 1, STEPS=plan.steps, UNIT=plan.unit, VEC=plan.vec,
        BLOCK_D=plan.block_d, BLOCK_G=plan.block_g, num_warps=plan.warps,
    )  # fmt: skip
    if plan.parts == 1:
        return _Backward(main)
    block = 64
    add_up = Launch(
        conv_parts_kernel, (triton.cdiv(channels * (width + 1), block),), channels, plan.parts,
        WIDTH=width, HAS_BIAS=bias is not None, BLOCK_P=32, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return _Backward(main, add_up, (plan.parts, width + 1, channels))


def _add_final(dx, dinit, dfinal, seq_idx):
    """The final states are the last inputs, and where the sequence is short also initial states."""
    tail, seqlen = dfinal.shape[2], dx.shape[2]
    if seq_idx is not None:
        dfinal = torch.where(in_last_sequence(seq_idx, tail + 1)[:, None], dfinal, 0)
    own = min(tail, seqlen)
    dx[..., seqlen - own :] += dfinal[..., tail - own :]
    if dinit is not None and own < tail:
        dinit[..., own:] += dfinal[..., : tail - own]


def _reach(seq_idx, width):
    """(B, L) int8 for the kernels: see `reach_kernel`."""
    if seq_idx is None:
        return None
    (batch, seqlen), block = seq_idx.shape, 1024
    reach = torch.empty(batch, seqlen, dtype=torch.int8, device=seq_idx.device)
    blocks = triton.cdiv(seqlen, block)
    reach_kernel[(batch * blocks,)](
        seq_idx, reach, seq_idx.stride(), seqlen, blocks, WIDTH=width, BLOCK=block, num_warps=4
    )
    return reach


def _strides(look):
    return (0, 0, 0) if look is None else look.strides
