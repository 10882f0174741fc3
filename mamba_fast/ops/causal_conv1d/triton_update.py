"""The kernels of decoding: a few tokens through the shift register, and registers cut out of packed rows."""

import functools

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from mamba_fast.ops.causal_conv1d.triton_steps import LOG2E, activate, convolve, load_weight
from mamba_fast.ops.triton_chain import add_parts, early, meet
from mamba_fast.ops.triton_launch import Launch, looks, named

TOKEN = 4  # taps and places of the register that conv_token_kernel is made for


def update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, pad_slot_id):
    """y of the tokens x (B, D, T); conv_state (entries, D, S) takes them in, in place."""
    (batch, channels, tokens), width, state_len = x.shape, weight.shape[1], conv_state.shape[2]
    y = torch.empty_like(x)
    bias, cache_seqlens, conv_state_indices = (
        None if v is None else v.contiguous() for v in (bias, cache_seqlens, conv_state_indices)
    )
    side_by_side = x.stride(1) == y.stride(1) == 1 and conv_state.is_contiguous() and weight.is_contiguous()
    if tokens == 1 and width == state_len == TOKEN and cache_seqlens is None and side_by_side:
        given = x, weight, bias, conv_state_indices, conv_state, y
        _token_launch(looks(*given), silu, pad_slot_id, x.device)(*given)
        return y
    block_d, block_s = min(128, next_power_of_2(channels)), next_power_of_2(state_len)
    blocks = -(-channels // block_d)
    conv_update_kernel[(blocks * batch,)](
        x, conv_state, weight, bias, cache_seqlens, conv_state_indices, y, x.stride(), conv_state.stride(),
        weight.stride(), y.stride(), channels, tokens, blocks, pad_slot_id,
        WIDTH=width, STATE=state_len, SILU=silu, HAS_BIAS=bias is not None,
        CIRCULAR=cache_seqlens is not None, INDEXED=conv_state_indices is not None,
        BLOCK_D=block_d, BLOCK_S=block_s, num_warps=4,
    )  # fmt: skip
    return y


@functools.lru_cache(maxsize=1024)
def _token_launch(looks, silu, pad_slot_id, device):
    x, *_, y = named(looks)
    batch, channels, _ = x.shape
    block_d = min(256, next_power_of_2(channels))
    return Launch(
        conv_token_kernel, (-(-batch // 2), -(-channels // block_d)),
        batch, x.strides[0], 0, y.strides[0], pad_slot_id, CHANNELS=channels, SILU=silu, PARTS=1,
        KNOWN=False, BLOCK_M=2, BLOCK_D=block_d, num_warps=4, **early(device),
    )  # fmt: skip


def varlen_states(x, cu_seqlens, state_len):
    """(B, D, state_len), channels side by side: the last tokens of each packed sequence of x (T, D)."""
    channels, batch = x.shape[1], len(cu_seqlens) - 1
    states = x.new_empty(batch, state_len, channels).transpose(1, 2)
    block_d, block_s = min(256, next_power_of_2(channels)), min(4, next_power_of_2(state_len))
    blocks = -(-channels // block_d)
    conv_states_kernel[(blocks * batch,)](
        x, cu_seqlens.contiguous(), states, x.stride(), states.stride(), channels, state_len, blocks,
        BLOCK_D=block_d, BLOCK_S=block_s, num_warps=4,
    )  # fmt: skip
    return states


@triton.jit
def conv_update_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, lengths_ptr, indices_ptr, y_ptr, x_strides, state_strides,
    weight_strides, y_strides, channels, tokens, blocks, pad_slot_id,
    WIDTH: tl.constexpr, STATE: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    CIRCULAR: tl.constexpr, INDEXED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """`tokens` steps of BLOCK_D channels of one sequence; conv_state is (entries, D, STATE)."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    offs_d = (pid % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < channels
    entry, alive, head = b, mask_d, 0
    if INDEXED:
        entry = tl.load(indices_ptr + b).to(tl.int64)
        alive = mask_d & ((entry >= 0) & (entry != pad_slot_id))
    if CIRCULAR:
        head = (tl.load(lengths_ptr + b) % STATE).to(tl.int32)
    scale: tl.constexpr = LOG2E if SILU else 1.0
    taps, bias = load_weight(weight_ptr, weight_strides, bias_ptr, offs_d, mask_d, scale, WIDTH, HAS_BIAS)
    state_at = state_ptr + entry * state_strides[0] + offs_d[:, None] * state_strides[1]
    past = ()
    for k in tl.static_range(WIDTH - 1):
        at = state_at + (head + STATE - WIDTH + 1 + k) % STATE * state_strides[2]
        past += (tl.load(at, mask=alive[:, None], other=0.0).to(tl.float32),)
    if not CIRCULAR:
        s = tl.arange(0, BLOCK_S)[None, :]
        kept = alive[:, None] & (s + tokens < STATE)
        state = tl.load(state_at + (s + tokens) * state_strides[2], mask=kept, other=0.0)
        tl.debug_barrier()  # another thread may read what this one overwrites
        tl.store(state_at + s * state_strides[2], state, mask=kept)
    x_at = x_ptr + b * x_strides[0] + offs_d[:, None] * x_strides[1]
    y_at = y_ptr + b * y_strides[0] + offs_d[:, None] * y_strides[1]
    for i in range(tokens):
        x = tl.load(x_at + tl.cast(i, tl.int64) * x_strides[2], mask=alive[:, None], other=0.0)
        slot = STATE - tokens + i  # negative: a later token takes the place of this one
        at = state_at + ((head + i) % STATE if CIRCULAR else slot) * state_strides[2]
        tl.store(at, x, mask=alive[:, None] & (slot >= 0))
        past += (x.to(tl.float32),)
        y = activate(convolve(past, 0, taps, bias, None, WIDTH, False), None, SILU, False)
        y = tl.where(alive[:, None], y, 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_at + tl.cast(i, tl.int64) * y_strides[2], y, mask=mask_d[:, None])
        past = past[1:]


@triton.jit
def conv_token_kernel(
    x_ptr, weight_ptr, bias_ptr, indices_ptr, state_ptr, y_ptr, batch, x_stride, x_part, y_stride,
    pad_slot_id, CHANNELS: tl.constexpr, SILU: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
    KNOWN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token of BLOCK_D channels of BLOCK_M sequences; four taps, and conv_state (entries, D, 4).

    The four places of a channel are one access. x is the sum of PARTS arrays, x_part apart.
    KNOWN: the kernel before this one writes x and nothing else of what is read here.
    """
    meet(PDL and not KNOWN)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d, k, entry, alive = d < CHANNELS, tl.arange(0, 4), m, m < batch
    if indices_ptr is not None:
        entry = tl.load(indices_ptr + m, mask=alive, other=-1).to(tl.int64)
        alive = (entry >= 0) & (entry != pad_slot_id)
    mask = alive[:, None] & mask_d[None, :]
    state_at = state_ptr + (entry[:, None] * CHANNELS + d[None, :])[:, :, None] * 4 + k[None, None, :]
    past = tl.load(state_at, mask=mask[:, :, None], other=0.0)  # (BLOCK_M, BLOCK_D, 4)
    taps = tl.load(weight_ptr + d[:, None] * 4 + k[None, :], mask=mask_d[:, None], other=0.0).to(tl.float32)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    meet(PDL and KNOWN)
    x = add_parts(x_ptr + m[:, None] * x_stride + d[None, :], mask, tl.cast(x_part, tl.int64), PARTS)
    even, odd = tl.split(past.reshape(BLOCK_M, BLOCK_D, 2, 2))
    _, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    x0 = x.to(y_ptr.dtype.element_ty).to(past.dtype)
    window = tl.join(tl.join(x1, x3), tl.join(x2, x0)).reshape(BLOCK_M, BLOCK_D, 4)
    tl.store(state_at, window, mask=mask[:, :, None])
    y = tl.sum(window.to(tl.float32) * taps[None, :, :], 2) + bias
    y = activate(y * LOG2E if SILU else y, None, SILU, False)
    y = tl.where(mask, y, 0.0)  # padding: nothing is read, 0 is written
    y_at = y_ptr + m[:, None] * y_stride + d[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(m < batch)[:, None] & mask_d[None, :])


@triton.jit
def conv_states_kernel(
    x_ptr, cu_seqlens_ptr, states_ptr, x_strides, states_strides, channels, state_len, blocks,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The last state_len tokens of one packed sequence, at the end of its row; zeros before them."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    offs_d = (pid % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64)
    for s0 in range(0, state_len, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = (offs_d < channels)[:, None] & (s < state_len)[None, :]
        token = (end - state_len + s)[None, :]
        at = x_ptr + token * x_strides[0] + offs_d[:, None] * x_strides[1]
        x = tl.load(at, mask=mask & (token >= first), other=0.0)
        at = states_ptr + row * states_strides[0] + offs_d[:, None] * states_strides[1]
        tl.store(at + s[None, :] * states_strides[2], x, mask=mask)


@triton.jit
def reach_kernel(seq_ptr, reach_ptr, strides, seqlen, blocks, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the WIDTH - 1 steps before a step are of its sequence; -1 where it is padding.

    What comes before the row counts as its first sequence: the initial states, or zeros.
    """
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    t = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = seq_ptr + b * strides[0]
    here = tl.load(row + t * strides[1], mask=t < seqlen, other=0)
    reach, same = tl.zeros((BLOCK,), tl.int32), tl.full((BLOCK,), 1, tl.int32)
    for j in tl.static_range(1, WIDTH):
        before = tl.load(row + tl.maximum(t - j, 0) * strides[1], mask=t < seqlen, other=0)
        same = same & (before == here).to(tl.int32)
        reach += same
    tl.store(reach_ptr + b * seqlen + t, tl.where(here < 0, -1, reach).to(tl.int8), mask=t < seqlen)
