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
from mamba_fast.ops.causal_conv1d.triton_update import conv_states_kernel, conv_update_kernel, reach_kernel
from mamba_fast.ops.rooms import multiprocessors
from mamba_fast.ops.selective_scan.backends import interpreted

__all__ = ["backward", "forward", "update", "varlen_states"]


class Blocks(NamedTuple):
    """Numbers of a tile (channels times groups), channels of a column tile, steps of a walk, warps."""

    tile: int
    block_d: int
    steps: int
    run: int
    warps: int


BLOCKS = {
    "forward_rows": Blocks(tile=256, block_d=1, steps=8, run=1, warps=4),
    "forward_columns": Blocks(tile=256, block_d=128, steps=8, run=32, warps=4),
    "backward_rows": Blocks(tile=128, block_d=1, steps=8, run=8, warps=4),
    "backward_columns": Blocks(tile=256, block_d=128, steps=4, run=64, warps=4),
}
if interpreted():  # small tiles, so that short sequences have several
    BLOCKS = {
        name: b._replace(tile=8, block_d=4, run=2)
        if name.endswith("rows")
        else b._replace(tile=16, block_d=4, run=16)
        for name, b in BLOCKS.items()
    }
_PROGRAMS_A_MULTIPROCESSOR = 32  # a walk is shortened where there would be fewer


class _Plan(NamedTuple):
    """How a call is cut. A program: block_d channels, block_g groups of `steps`, `run` of them in turn."""

    columns: bool
    block_d: int
    block_g: int
    steps: int
    run: int
    vec: int
    tiles: int
    blocks: int
    warps: int


def _plan(x, direction, *others):
    """Block sizes for x; `others` are the strides of the other tensors of its shape."""
    batch, channels, seqlen = x.shape
    strides = x.stride()
    columns = strides[1] == 1 and (strides[2] != 1 or seqlen == 1)
    table = BLOCKS[f"{direction}_{'columns' if columns else 'rows'}"]
    width = 16 // x.element_size()  # numbers in the widest access of a thread
    if columns:
        vec = math.gcd(width, channels, strides[0], strides[2], *(s for o in others for s in o[::2]))
        block_d, steps, run = min(table.block_d, _power_of_2(channels)), table.steps, table.run
        run = min(run, -(-seqlen // steps) * steps)
        tile = table.tile // 2 if vec == 1 else table.tile  # number by number takes more registers
        block_g = min(tile // block_d, _power_of_2(-(-seqlen // run)))
        tiles = -(-seqlen // (block_g * run))
    else:
        vec = math.gcd(width, seqlen, strides[0], strides[1], *(s for o in others for s in o[:2]))
        steps = min(table.steps, width)
        block_g = min(table.tile, _power_of_2(-(-seqlen // steps)))
        block_d = max(table.block_d, min(table.tile // block_g, _power_of_2(channels)))
        tiles = -(-seqlen // (block_g * steps))
        rows = batch * -(-channels // block_d)
        run = max(
            1, min(table.run, tiles * rows // (_PROGRAMS_A_MULTIPROCESSOR * _multiprocessors(x.device)))
        )
        tiles = -(-tiles // run)
    return _Plan(columns, block_d, block_g, steps, run, vec, tiles, -(-channels // block_d), table.warps)


def _power_of_2(n):
    return 1 << (n - 1).bit_length()


_multiprocessors = functools.cache(lambda device: multiprocessors(torch.empty(0, device=device)))


def forward(x, weight, bias, seq_idx, initial_states, silu, want_final):
    """y (B, D, L) and final states (B, D, W - 1), which are empty if nobody wants them."""
    batch, channels, seqlen = x.shape
    y = torch.empty_like(x)
    plan = _plan(x, "forward", y.stride())
    width = weight.shape[1]
    bias = None if bias is None else bias.contiguous()
    kernel = conv_columns_kernel if plan.columns else conv_rows_kernel
    kernel[(plan.tiles * plan.blocks * batch,)](
        x, weight, bias, initial_states, _reach(seq_idx, width), y, x.stride(), weight.stride(),
        _strides(initial_states), y.stride(), channels, seqlen, plan.tiles, plan.blocks, plan.run,
        WIDTH=width, SILU=silu, HAS_BIAS=bias is not None, HAS_INIT=initial_states is not None,
        PACKED=seq_idx is not None, STEPS=plan.steps, VEC=plan.vec, BLOCK_D=plan.block_d,
        BLOCK_G=plan.block_g, num_warps=plan.warps,
    )  # fmt: skip
    if want_final:
        return y, final_states_torch(x, width, seq_idx, initial_states)
    return y, x.new_empty(0)


def backward(dy, dfinal, x, weight, bias, seq_idx, initial_states, silu):
    """dx, dweight, dbias, dinitial_states; None if absent. dfinal is None if nobody wanted final states."""
    (batch, channels, seqlen), width = x.shape, weight.shape[1]
    dx = torch.empty_like(x)
    plan = _plan(x, "backward", dx.stride(), dy.stride())
    fast = 1 if plan.columns else 2
    if dy.stride(fast) != 1:  # reading across the grain is slower than a copy
        dy = torch.empty_like(x).copy_(dy)
        plan = _plan(x, "backward", dx.stride())
    parts = batch * plan.tiles
    sums = torch.empty(parts, width + 1, channels, dtype=torch.float32, device=x.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    dinit = None if initial_states is None else torch.empty_like(initial_states)
    bias = None if bias is None else bias.contiguous()
    kernel = conv_columns_backward_kernel if plan.columns else conv_rows_backward_kernel
    kernel[(plan.tiles * plan.blocks * batch,)](
        x, weight, bias, initial_states, _reach(seq_idx, width), dy, dx, sums, dinit, x.stride(),
        weight.stride(), _strides(initial_states), dy.stride(), dx.stride(), _strides(dinit), channels,
        seqlen, plan.tiles, plan.blocks, plan.run,
        WIDTH=width, SILU=silu, HAS_BIAS=bias is not None, HAS_INIT=dinit is not None,
        PACKED=seq_idx is not None, STEPS=plan.steps, VEC=plan.vec, BLOCK_D=plan.block_d,
        BLOCK_G=plan.block_g, num_warps=plan.warps,
    )  # fmt: skip
    block = 64
    conv_parts_kernel[(triton.cdiv(channels * (width + 1), block),)](
        sums, dweight, dbias, channels, parts, WIDTH=width, HAS_BIAS=bias is not None,
        BLOCK_P=32, BLOCK=block, num_warps=4,
    )  # fmt: skip
    if dfinal is not None:
        _add_final(dx, dinit, dfinal, seq_idx)
    return dx, dweight, dbias, dinit


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


def update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, pad_slot_id):
    """y of the tokens x (B, D, T); conv_state (entries, D, S) takes them in, in place."""
    (batch, channels, tokens), width, state_len = x.shape, weight.shape[1], conv_state.shape[2]
    y = torch.empty_like(x)
    bias, cache_seqlens, conv_state_indices = (
        None if v is None else v.contiguous() for v in (bias, cache_seqlens, conv_state_indices)
    )
    block_d, block_s = min(128, _power_of_2(channels)), _power_of_2(state_len)
    blocks = -(-channels // block_d)
    conv_update_kernel[(blocks * batch,)](
        x, conv_state, weight, bias, cache_seqlens, conv_state_indices, y, x.stride(), conv_state.stride(),
        weight.stride(), y.stride(), channels, tokens, blocks, pad_slot_id,
        WIDTH=width, STATE=state_len, SILU=silu, HAS_BIAS=bias is not None,
        CIRCULAR=cache_seqlens is not None, INDEXED=conv_state_indices is not None,
        BLOCK_D=block_d, BLOCK_S=block_s, num_warps=4,
    )  # fmt: skip
    return y


def varlen_states(x, cu_seqlens, state_len):
    """(B, D, state_len), channels side by side: the last tokens of each packed sequence of x (T, D)."""
    channels, batch = x.shape[1], len(cu_seqlens) - 1
    states = x.new_empty(batch, state_len, channels).transpose(1, 2)
    block_d, block_s = min(256, _power_of_2(channels)), min(4, _power_of_2(state_len))
    blocks = -(-channels // block_d)
    conv_states_kernel[(blocks * batch,)](
        x, cu_seqlens.contiguous(), states, x.stride(), states.stride(), channels, state_len, blocks,
        BLOCK_D=block_d, BLOCK_S=block_s, num_warps=4,
    )  # fmt: skip
    return states


def _strides(tensor):
    return (0, 0, 0) if tensor is None else tensor.stride()
