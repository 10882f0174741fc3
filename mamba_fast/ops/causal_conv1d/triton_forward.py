"""The forward kernels: one for time steps that lie side by side in memory, one for channels that do."""

import triton
import triton.language as tl

from mamba_fast.ops.causal_conv1d.triton_steps import (
    LOG2E,
    activate,
    columns_at,
    convolve,
    enter,
    inside,
    load_groups,
    load_weight,
    locate,
    offsets,
    store_groups,
)


@triton.jit
def conv_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, init_ptr, reach_ptr, y_ptr, x_strides, weight_strides, init_strides,
    y_strides, channels, seqlen, tiles, blocks, run,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr,
    PACKED: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Time along the lanes: a thread takes STEPS steps, and reads the group before them a second time."""
    tile, b, offs_d = locate(tiles, blocks, BLOCK_D)
    mask_d = offs_d < channels
    scale: tl.constexpr = LOG2E if SILU else 1.0
    taps, bias = load_weight(weight_ptr, weight_strides, bias_ptr, offs_d, mask_d, scale, WIDTH, HAS_BIAS)
    mask_d = mask_d[:, None]
    offs_l = offsets(tile, BLOCK_G, STEPS, UNIT)
    starts = ((tile * BLOCK_G + tl.arange(0, BLOCK_G)) * STEPS)[None, :]
    x_rows = x_ptr + tl.multiple_of(b * x_strides[0] + offs_d * x_strides[1], VEC)[:, None, None]
    past = load_groups(x_rows, x_strides[2], offs_l - UNIT, mask_d, seqlen, 0.0, UNIT, UNIT, VEC)
    here = load_groups(x_rows, x_strides[2], offs_l, mask_d, seqlen, 0.0, STEPS, UNIT, VEC)
    window = enter(
        past[UNIT - WIDTH + 1 :], init_ptr, init_strides, b, offs_d, mask_d, starts, WIDTH, HAS_INIT
    )
    for i in tl.static_range(STEPS):
        window += (here[i].to(tl.float32),)
    reach = here
    if PACKED:
        row = reach_ptr + tl.multiple_of(b * seqlen, VEC)
        reach = load_groups(row, 1, offs_l, mask_d, seqlen, -1, STEPS, UNIT, VEC)
    y = ()
    for i in tl.static_range(STEPS):
        p = convolve(window, i, taps, bias, reach[i], WIDTH, PACKED)
        y += (activate(p, reach[i], SILU, PACKED).to(y_ptr.dtype.element_ty),)
    y_rows = y_ptr + tl.multiple_of(b * y_strides[0] + offs_d * y_strides[1], VEC)[:, None, None]
    store_groups(y_rows, y_strides[2], offs_l, mask_d, seqlen, y, STEPS, UNIT, VEC)


@triton.jit
def conv_columns_kernel(
    x_ptr, weight_ptr, bias_ptr, init_ptr, reach_ptr, y_ptr, x_strides, weight_strides, init_strides,
    y_strides, channels, seqlen, tiles, blocks, run,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr,
    PACKED: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Channels along the lanes: a thread walks over `run` steps and keeps the last WIDTH - 1 of them.

    VEC channels lie side by side; UNIT steps in a row are all of the sequence, or none of them.
    """
    tile, b, offs_d = locate(tiles, blocks, BLOCK_D)
    mask_d = offs_d < channels
    scale: tl.constexpr = LOG2E if SILU else 1.0
    taps, bias = load_weight(weight_ptr, weight_strides, bias_ptr, offs_d, mask_d, scale, WIDTH, HAS_BIAS)
    mask_d = inside(offs_d, channels, VEC)[:, None]
    t = (tile * BLOCK_G + tl.arange(0, BLOCK_G)) * run
    x_at = columns_at(x_ptr, b, offs_d, t, x_strides, VEC)
    y_at = columns_at(y_ptr, b, offs_d, t, y_strides, VEC)
    t = t[None, :]
    past = ()
    for k in tl.static_range(1 - WIDTH, 0):
        mask = mask_d & (t + k >= 0) & (t + k < seqlen)
        past += (
            tl.load(x_at + tl.multiple_of(tl.cast(k, tl.int64) * x_strides[2], VEC), mask=mask, other=0.0),
        )
    past = enter(past, init_ptr, init_strides, b, offs_d, mask_d, t, WIDTH, HAS_INIT)
    left = tl.cast(tl.minimum(seqlen - t, run), tl.int32)  # steps of this stretch
    for done in range(0, run, STEPS):
        window, reach, masks = past, (), ()
        for i in tl.static_range(STEPS):
            mask = mask_d & (done + i // UNIT * UNIT < left)
            step = tl.cast(i, tl.int64)
            x = tl.load(x_at + tl.multiple_of(step * x_strides[2], VEC), mask=mask, other=0.0)
            window += (x.to(tl.float32),)
            masks += (mask,)
            if PACKED:
                at = reach_ptr + b * seqlen + t + (done + i)
                reach += (tl.load(at, mask=done + i < left, other=-1),)
            else:
                reach += (mask,)
        for i in tl.static_range(STEPS):
            y = activate(convolve(window, i, taps, bias, reach[i], WIDTH, PACKED), reach[i], SILU, PACKED)
            at = y_at + tl.multiple_of(tl.cast(i, tl.int64) * y_strides[2], VEC)
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=masks[i])
        past = window[STEPS:]
        x_at += tl.multiple_of(tl.cast(STEPS, tl.int64) * x_strides[2], VEC)
        y_at += tl.multiple_of(tl.cast(STEPS, tl.int64) * y_strides[2], VEC)
