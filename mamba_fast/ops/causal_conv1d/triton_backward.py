"""The backward kernels: one pass over x and dy gives dx and, in shares, dweight and dbias."""

import triton
import triton.language as tl

from mamba_fast.ops.causal_conv1d.triton_steps import (
    add_sums,
    convolve,
    correlate,
    deactivate,
    enter,
    inside,
    join_steps,
    load_groups,
    load_weight,
    locate,
    store_sums,
)


@triton.jit
def _no_sums(BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, WIDTH: tl.constexpr):
    zero = tl.zeros((BLOCK_D, BLOCK_G), tl.float32)
    sums = (zero,)
    for _ in tl.static_range(WIDTH):
        sums += (zero,)
    return sums


@triton.jit
def conv_rows_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, init_ptr, reach_ptr, dy_ptr, dx_ptr, sums_ptr, dinit_ptr, x_strides,
    weight_strides, init_strides, dy_strides, dx_strides, dinit_strides, channels, seqlen, tiles, blocks, run,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr,
    PACKED: tl.constexpr, STEPS: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Time along the lanes. dx of a group needs dp of the first WIDTH - 1 steps after it: found twice."""
    tile, b, offs_d = locate(tiles, blocks, BLOCK_D)
    mask_d = offs_d < channels
    part = b * tiles + tile
    taps, bias = load_weight(weight_ptr, weight_strides, bias_ptr, offs_d, mask_d, WIDTH, HAS_BIAS)
    mask_d = mask_d[:, None]
    x_rows = x_ptr + tl.multiple_of(b * x_strides[0] + offs_d * x_strides[1], VEC)[:, None]
    dy_rows = dy_ptr + tl.multiple_of(b * dy_strides[0] + offs_d * dy_strides[1], VEC)[:, None]
    dx_rows = dx_ptr + tl.multiple_of(b * dx_strides[0] + offs_d * dx_strides[1], VEC)[:, None]
    reach_row = reach_ptr
    if PACKED:
        reach_row = reach_ptr + tl.multiple_of(b * seqlen, VEC)
    offs_l = tile * (run * BLOCK_G * STEPS) + tl.arange(0, BLOCK_G * STEPS)
    starts = tile * (run * BLOCK_G * STEPS) + tl.arange(0, BLOCK_G) * STEPS
    sums = _no_sums(BLOCK_D, BLOCK_G, WIDTH)
    for _ in range(run):
        past = load_groups(x_rows, x_strides[2], offs_l - STEPS, mask_d, seqlen, 0.0, STEPS, VEC)
        here = load_groups(x_rows, x_strides[2], offs_l, mask_d, seqlen, 0.0, STEPS, VEC)
        here += load_groups(x_rows, x_strides[2], offs_l + STEPS, mask_d, seqlen, 0.0, STEPS, VEC)
        dy = load_groups(dy_rows, dy_strides[2], offs_l, mask_d, seqlen, 0.0, STEPS, VEC)
        dy += load_groups(dy_rows, dy_strides[2], offs_l + STEPS, mask_d, seqlen, 0.0, STEPS, VEC)
        reach = here
        if PACKED:
            reach = load_groups(reach_row, 1, offs_l, mask_d, seqlen, -1, STEPS, VEC)
            reach += load_groups(reach_row, 1, offs_l + STEPS, mask_d, seqlen, -1, STEPS, VEC)
        window = enter(
            past[STEPS - WIDTH + 1 :], init_ptr, init_strides, b, offs_d, mask_d, starts, WIDTH, HAS_INIT
        )
        dp = ()
        for i in tl.static_range(STEPS + WIDTH - 1):
            window += (here[i].to(tl.float32),)
            p = convolve(window, i, taps, bias, reach[i], WIDTH, PACKED)
            dp += (deactivate(dy[i].to(tl.float32), p, reach[i], SILU, PACKED),)
        dx = ()
        for i in tl.static_range(STEPS):
            sums = add_sums(sums, dp[i], window, i, reach[i], WIDTH, PACKED)
            dx += (correlate(dp, i, reach, taps, WIDTH, PACKED).to(dx_ptr.dtype.element_ty),)
        mask = mask_d & inside(offs_l, seqlen, VEC)[None, :]
        tl.store(dx_rows + offs_l[None, :] * dx_strides[2], join_steps(dx, STEPS), mask=mask)
        if HAS_INIT:
            _store_dinit(dinit_ptr, dinit_strides, b, offs_d, mask_d & (starts == 0)[None, :], dp, reach,
                         taps, WIDTH, PACKED)  # fmt: skip
        offs_l += BLOCK_G * STEPS
        starts += BLOCK_G * STEPS
    store_sums(sums_ptr, sums, part, channels, offs_d, offs_d < channels, WIDTH)


@triton.jit
def _store_dinit(ptr, strides, b, offs_d, mask, dp, reach, taps, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """The gradient of the WIDTH - 1 steps before the sequence, from dp of its first steps."""
    nothing, nowhere = (), ()
    for _ in tl.static_range(WIDTH - 1):
        nothing += (tl.zeros_like(dp[0]),)
        nowhere += (reach[0],)
    for k in tl.static_range(WIDTH - 1):
        dx = correlate(nothing + dp, k, nowhere + reach, taps, WIDTH, PACKED)
        at = ptr + b * strides[0] + offs_d[:, None] * strides[1] + k * strides[2]
        tl.store(at + tl.zeros(dx.shape, tl.int32), dx.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _walk(
    t, past, dp, reach, sums, end, x_at, dy_at, dx_at, reach_row, dinit_at, x_stride, dy_stride, dx_stride,
    dinit_stride, mask_d, seqlen, taps, bias,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_INIT: tl.constexpr,
    PACKED: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """STEPS steps on: dp of each, its share of the sums, and dx of the steps WIDTH - 1 before them."""
    window, dy = past, ()
    for i in tl.static_range(STEPS):
        mask = mask_d & (t + i < seqlen)[None, :]
        at = tl.multiple_of((t + i) * x_stride, VEC)[None, :]
        window += (tl.load(x_at + at, mask=mask, other=0.0).to(tl.float32),)
        at = tl.multiple_of((t + i) * dy_stride, VEC)[None, :]
        dy += (tl.load(dy_at + at, mask=mask, other=0.0),)
        step = mask
        if PACKED:
            step = tl.load(reach_row + t + i, mask=t + i < seqlen, other=-1)[None, :]
        reach += (step,)
    for i in tl.static_range(STEPS):
        now = reach[i + WIDTH - 1]
        p = convolve(window, i, taps, bias, now, WIDTH, PACKED)
        dp += (deactivate(dy[i].to(tl.float32), p, now, SILU, PACKED),)
        sums = add_sums(sums, dp[i + WIDTH - 1], window, i, now, WIDTH, PACKED)
        dx = correlate(dp, i, reach, taps, WIDTH, PACKED)
        to = t + (i - WIDTH + 1)
        own = (to >= end[0]) & (to < end[1])
        at = tl.multiple_of(to * dx_stride, VEC)[None, :]
        tl.store(dx_at + at, dx.to(dx_at.dtype.element_ty), mask=mask_d & own[None, :])
        if HAS_INIT:
            if i < WIDTH - 1:
                at = dinit_at + i * dinit_stride + tl.zeros_like(t)[None, :]
                tl.store(at, dx.to(dinit_at.dtype.element_ty), mask=mask_d & (t == 0)[None, :])
    return window[STEPS:], dp[STEPS:], reach[STEPS:], sums


@triton.jit
def conv_columns_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, init_ptr, reach_ptr, dy_ptr, dx_ptr, sums_ptr, dinit_ptr, x_strides,
    weight_strides, init_strides, dy_strides, dx_strides, dinit_strides, channels, seqlen, tiles, blocks, run,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr,
    PACKED: tl.constexpr, STEPS: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Channels along the lanes: a thread walks over `run` steps and WIDTH - 1 more, and keeps x and dp."""
    tile, b, offs_d = locate(tiles, blocks, BLOCK_D)
    mask_d = offs_d < channels
    taps, bias = load_weight(weight_ptr, weight_strides, bias_ptr, offs_d, mask_d, WIDTH, HAS_BIAS)
    mask_d = inside(offs_d, channels, VEC)[:, None]
    t = (tile * BLOCK_G + tl.arange(0, BLOCK_G)) * run
    end = (t, tl.minimum(t + run, seqlen))
    x_at = x_ptr + tl.multiple_of(b * x_strides[0], VEC) + offs_d[:, None] * x_strides[1]
    dy_at = dy_ptr + tl.multiple_of(b * dy_strides[0], VEC) + offs_d[:, None] * dy_strides[1]
    dx_at = dx_ptr + tl.multiple_of(b * dx_strides[0], VEC) + offs_d[:, None] * dx_strides[1]
    dinit_at, reach_row = dx_at, reach_ptr
    if HAS_INIT:
        dinit_at = dinit_ptr + b * dinit_strides[0] + offs_d[:, None] * dinit_strides[1]
    if PACKED:
        reach_row = reach_ptr + b * seqlen
    past, dp, reach = (), (), ()
    for k in tl.static_range(WIDTH - 1):
        before = t + (k - WIDTH + 1)
        mask = mask_d & ((before >= 0) & (before < seqlen))[None, :]
        at = x_at + tl.multiple_of(before * x_strides[2], VEC)[None, :]
        past += (tl.load(at, mask=mask, other=0.0),)
        dp += (tl.zeros((BLOCK_D, BLOCK_G), tl.float32),)
        step = mask
        if PACKED:
            step = tl.full((1, BLOCK_G), -1, tl.int8)
        reach += (step,)
    past = enter(past, init_ptr, init_strides, b, offs_d, mask_d, t, WIDTH, HAS_INIT)
    sums = _no_sums(BLOCK_D, BLOCK_G, WIDTH)
    for _ in range(0, run, STEPS):
        past, dp, reach, sums = _walk(
            t, past, dp, reach, sums, end, x_at, dy_at, dx_at, reach_row, dinit_at, x_strides[2],
            dy_strides[2], dx_strides[2], dinit_strides[2], mask_d, seqlen, taps, bias,
            STEPS, WIDTH, SILU, HAS_INIT, PACKED, VEC,
        )  # fmt: skip
        t += STEPS
    _walk(  # only for dx: what it adds to the sums is another walk's
        t, past, dp, reach, sums, end, x_at, dy_at, dx_at, reach_row, dinit_at, x_strides[2],
        dy_strides[2], dx_strides[2], dinit_strides[2], mask_d, seqlen, taps, bias,
        WIDTH - 1, WIDTH, SILU, HAS_INIT, PACKED, VEC,
    )  # fmt: skip
    store_sums(sums_ptr, sums, b * tiles + tile, channels, offs_d, offs_d < channels, WIDTH)


@triton.jit
def conv_parts_kernel(
    sums_ptr, dweight_ptr, dbias_ptr, channels, parts,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight (D, WIDTH) and dbias (D,) from the shares (parts, WIDTH + 1, D): always in the same order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    size = channels * (WIDTH + 1)
    for p in range(0, parts, BLOCK_P):
        mask = (p + rows < parts)[:, None] & (column < size)[None, :]
        at = (p + rows).to(tl.int64)[:, None] * size + column[None, :]
        total += tl.load(sums_ptr + at, mask=mask, other=0.0)
    value = tl.sum(total, axis=0)
    k, d = column // channels, column % channels
    tl.store(dweight_ptr + d * WIDTH + k, value.to(dweight_ptr.dtype.element_ty), mask=k < WIDTH)
    if HAS_BIAS:
        tl.store(dbias_ptr + d, value.to(dbias_ptr.dtype.element_ty), mask=(k == WIDTH) & (column < size))
