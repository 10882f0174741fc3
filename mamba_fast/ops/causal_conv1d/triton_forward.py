"""The forward kernels: one for time steps that lie side by side in memory, one for channels that do."""

import triton
import triton.language as tl

from mamba_fast.ops.causal_conv1d.triton_steps import (
    activate,
    convolve,
    enter,
    inside,
    join_steps,
    load_groups,
    load_weight,
    locate,
)


@triton.jit
def conv_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, init_ptr, reach_ptr, y_ptr, x_strides, weight_strides, init_strides,
    y_strides, channels, seqlen, tiles, blocks, run,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr,
    PACKED: tl.constexpr, STEPS: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Time along the lanes: a thread takes STEPS steps, and reads the group before them a second time."""
    tile, b, offs_d = locate(tiles, blocks, BLOCK_D)
    mask_d = offs_d < channels
    taps, bias = load_weight(weight_ptr, weight_strides, bias_ptr, offs_d, mask_d, WIDTH, HAS_BIAS)
    mask_d = mask_d[:, None]
    offs_l = tile * (BLOCK_G * STEPS) + tl.arange(0, BLOCK_G * STEPS)
    starts = tile * (BLOCK_G * STEPS) + tl.arange(0, BLOCK_G) * STEPS
    x_rows = x_ptr + tl.multiple_of(b * x_strides[0] + offs_d * x_strides[1], VEC)[:, None]
    past = load_groups(x_rows, x_strides[2], offs_l - STEPS, mask_d, seqlen, 0.0, STEPS, VEC)
    here = load_groups(x_rows, x_strides[2], offs_l, mask_d, seqlen, 0.0, STEPS, VEC)
    window = enter(
        past[STEPS - WIDTH + 1 :], init_ptr, init_strides, b, offs_d, mask_d, starts, WIDTH, HAS_INIT
    )
    for i in tl.static_range(STEPS):
        window += (here[i].to(tl.float32),)
    reach = here
    if PACKED:
        row = reach_ptr + tl.multiple_of(b * seqlen, VEC)
        reach = load_groups(row, 1, offs_l, mask_d, seqlen, -1, STEPS, VEC)
    y = ()
    for i in tl.static_range(STEPS):
        p = convolve(window, i, taps, bias, reach[i], WIDTH, PACKED)
        y += (activate(p, reach[i], SILU, PACKED).to(y_ptr.dtype.element_ty),)
    y_rows = y_ptr + tl.multiple_of(b * y_strides[0] + offs_d * y_strides[1], VEC)[:, None]
    mask = mask_d & inside(offs_l, seqlen, VEC)[None, :]
    tl.store(y_rows + offs_l[None, :] * y_strides[2], join_steps(y, STEPS), mask=mask)


@triton.jit
def conv_columns_kernel(
    x_ptr, weight_ptr, bias_ptr, init_ptr, reach_ptr, y_ptr, x_strides, weight_strides, init_strides,
    y_strides, channels, seqlen, tiles, blocks, run,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr,
    PACKED: tl.constexpr, STEPS: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Channels along the lanes: a thread walks over `run` steps and keeps the last WIDTH - 1 of them."""
    tile, b, offs_d = locate(tiles, blocks, BLOCK_D)
    mask_d = offs_d < channels
    taps, bias = load_weight(weight_ptr, weight_strides, bias_ptr, offs_d, mask_d, WIDTH, HAS_BIAS)
    mask_d = inside(offs_d, channels, VEC)[:, None]
    t = (tile * BLOCK_G + tl.arange(0, BLOCK_G)) * run
    x_at = x_ptr + tl.multiple_of(b * x_strides[0], VEC) + offs_d[:, None] * x_strides[1]
    y_at = y_ptr + tl.multiple_of(b * y_strides[0], VEC) + offs_d[:, None] * y_strides[1]
    past = ()
    for k in tl.static_range(WIDTH - 1):
        before = t + (k - WIDTH + 1)
        mask = mask_d & ((before >= 0) & (before < seqlen))[None, :]
        at = x_at + tl.multiple_of(before * x_strides[2], VEC)[None, :]
        past += (tl.load(at, mask=mask, other=0.0),)
    past = enter(past, init_ptr, init_strides, b, offs_d, mask_d, t, WIDTH, HAS_INIT)
    for _ in range(0, run, STEPS):
        window, reach = past, ()
        for i in tl.static_range(STEPS):
            mask = mask_d & (t + i < seqlen)[None, :]
            at = x_at + tl.multiple_of((t + i) * x_strides[2], VEC)[None, :]
            window += (tl.load(at, mask=mask, other=0.0).to(tl.float32),)
            step = mask
            if PACKED:
                step = tl.load(reach_ptr + b * seqlen + t + i, mask=t + i < seqlen, other=-1)[None, :]
            reach += (step,)
        for i in tl.static_range(STEPS):
            y = activate(convolve(window, i, taps, bias, reach[i], WIDTH, PACKED), reach[i], SILU, PACKED)
            at = y_at + tl.multiple_of((t + i) * y_strides[2], VEC)[None, :]
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask_d & (t + i < seqlen)[None, :])
        past = window[STEPS:]
        t += STEPS
