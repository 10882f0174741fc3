"""The backward kernels: one pass over x and dy gives dx and, in shares, dweight and dbias."""

import triton
import triton.language as tl

from mamba_fast.ops.causal_conv1d.triton_steps import (
    add_sums,
    columns_at,
    convolve,
    correlate,
    deactivate,
    enter,
    inside,
    load_groups,
    load_weight,
    locate,
    offsets,
    store_groups,
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
    x_ptr, weight_ptr, bias_ptr, init_ptr, reach_ptr, dy_ptr, dx_ptr, sums_ptr, dweight_ptr, dbias_ptr,
    dinit_ptr, x_strides, weight_strides, init_strides, dy_strides, dx_strides, dinit_strides, batch,
    channels, seqlen, tiles, blocks, run, rows,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr,
    PACKED: tl.constexpr, DIRECT: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Time along the lanes: `run` tiles of each of `rows` batch elements.

    dx of a group needs dp of the first WIDTH - 1 steps after it: found twice.
    """
    tile, part, offs_d = locate(tiles, blocks, BLOCK_D)
    mask_d = offs_d < channels
    taps, bias = load_weight(weight_ptr, weight_strides, bias_ptr, offs_d, mask_d, 1.0, WIDTH, HAS_BIAS)
    mask_d = mask_d[:, None]
    sums = _no_sums(BLOCK_D, BLOCK_G, WIDTH)
    for row in range(part * rows, tl.minimum(part * rows + rows, batch)):
        b = tl.cast(row, tl.int64)
        x_rows = x_ptr + tl.multiple_of(b * x_strides[0] + offs_d * x_strides[1], VEC)[:, None, None]
        dy_rows = dy_ptr + tl.multiple_of(b * dy_strides[0] + offs_d * dy_strides[1], VEC)[:, None, None]
        dx_rows = dx_ptr + tl.multiple_of(b * dx_strides[0] + offs_d * dx_strides[1], VEC)[:, None, None]
        reach_row = reach_ptr
        if PACKED:
            reach_row = reach_ptr + tl.multiple_of(b * seqlen, VEC)
        offs_l = offsets(tile * run, BLOCK_G, STEPS, UNIT)
        starts = ((tile * run * BLOCK_G + tl.arange(0, BLOCK_G)) * STEPS)[None, :]
        for _ in range(run):
            past = load_groups(x_rows, x_strides[2], offs_l - UNIT, mask_d, seqlen, 0.0, UNIT, UNIT, VEC)
            here = load_groups(x_rows, x_strides[2], offs_l, mask_d, seqlen, 0.0, STEPS + UNIT, UNIT, VEC)
            dy = load_groups(dy_rows, dy_strides[2], offs_l, mask_d, seqlen, 0.0, STEPS + UNIT, UNIT, VEC)
            reach = here
            if PACKED:
                reach = load_groups(reach_row, 1, offs_l, mask_d, seqlen, -1, STEPS + UNIT, UNIT, VEC)
            window = enter(
                past[UNIT - WIDTH + 1 :], init_ptr, init_strides, b, offs_d, mask_d, starts, WIDTH, HAS_INIT
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
            store_groups(dx_rows, dx_strides[2], offs_l, mask_d, seqlen, dx, STEPS, UNIT, VEC)
            if HAS_INIT:
                _store_dinit(dinit_ptr, dinit_strides, b, offs_d, mask_d & (starts == 0), dp, reach, taps,
                             WIDTH, PACKED)  # fmt: skip
            offs_l += BLOCK_G * STEPS
            starts += BLOCK_G * STEPS
    store_sums(
        sums_ptr, dweight_ptr, dbias_ptr, sums, part * tiles + tile, channels, offs_d, offs_d < channels,
        WIDTH, HAS_BIAS, DIRECT,
    )  # fmt: skip


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
def _reach_of(row, offs_l, mask, PACKED: tl.constexpr):
    """reach of a step of each stretch; anything where rows are not packed."""
    reach = mask
    if PACKED:
        reach = tl.load(row + offs_l, mask=mask, other=-1)
    return reach


@triton.jit
def _after(
    x_at, dy_at, x_stride, dy_stride, reach_at, t, mask_d, seqlen, taps, bias,
    WIDTH: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """dp and reach of the WIDTH - 1 steps from t (1, BLOCK_G) on, found for dx of the steps before them."""
    window, dp, reach = (), (), ()
    for k in tl.static_range(1 - WIDTH, WIDTH - 1):
        at = x_at + tl.multiple_of(tl.cast(k, tl.int64) * x_stride, VEC)
        window += (tl.load(at, mask=mask_d & (t + k < seqlen), other=0.0).to(tl.float32),)
    for k in tl.static_range(WIDTH - 1):
        mask = mask_d & (t + k < seqlen)
        at = dy_at + tl.multiple_of(tl.cast(k, tl.int64) * dy_stride, VEC)
        dy = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        reach += (_reach_of(reach_at, t + k, t + k < seqlen, PACKED),)
        p = convolve(window, k, taps, bias, reach[k], WIDTH, PACKED)
        dp += (deactivate(dy, p, reach[k], SILU, PACKED),)
    return dp, reach


@triton.jit
def _before(
    x_at, dy_at, x_stride, dy_stride, first, t, left, mask_d,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """x and dy of the STEPS steps before those at x_at, dy_at: of this stretch, and x of WIDTH - 1 more."""
    x, dy = (), ()
    for i in tl.static_range(STEPS):
        at = tl.cast(i - STEPS, tl.int64)
        near = first - STEPS + i // UNIT * UNIT < left
        mask = mask_d & near & (first > 0)
        dy += (tl.load(dy_at + tl.multiple_of(at * dy_stride, VEC), mask=mask, other=0.0),)
        if i > STEPS - WIDTH:
            mask = mask_d & near & ((first > 0) | (t > 0))
        x += (tl.load(x_at + tl.multiple_of(at * x_stride, VEC), mask=mask, other=0.0),)
    return x, dy


@triton.jit
def _store_dx(
    at, stride, dp, reach, taps, mask_d, first, left,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """dx of STEPS steps from dp of these and of the WIDTH - 1 after them."""
    for i in tl.static_range(STEPS):
        dx = correlate(dp, i, reach, taps, WIDTH, PACKED).to(at.dtype.element_ty)
        mask = mask_d & (first + i // UNIT * UNIT < left)
        tl.store(at + tl.multiple_of(tl.cast(i, tl.int64) * stride, VEC), dx, mask=mask)


@triton.jit
def conv_columns_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, init_ptr, reach_ptr, dy_ptr, dx_ptr, sums_ptr, dweight_ptr, dbias_ptr,
    dinit_ptr, x_strides, weight_strides, init_strides, dy_strides, dx_strides, dinit_strides, batch,
    channels, seqlen, tiles, blocks, run, rows,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr,
    PACKED: tl.constexpr, DIRECT: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Channels along the lanes: a thread walks back over `run` steps, and keeps dp of the WIDTH - 1 after.

    x and dy of STEPS steps are on their way from memory while those after them are worked on.
    VEC channels lie side by side; UNIT steps in a row are all of the sequence, or none of them.
    """
    tile, b, offs_d = locate(tiles, blocks, BLOCK_D)
    mask_d, mask = inside(offs_d, channels, VEC)[:, None], offs_d < channels
    taps, bias = load_weight(weight_ptr, weight_strides, bias_ptr, offs_d, mask, 1.0, WIDTH, HAS_BIAS)
    t = (tile * BLOCK_G + tl.arange(0, BLOCK_G)) * run
    x_at = columns_at(x_ptr, b, offs_d, t + run, x_strides, VEC)
    dy_at = columns_at(dy_ptr, b, offs_d, t + run, dy_strides, VEC)
    dx_at = columns_at(dx_ptr, b, offs_d, t + run, dx_strides, VEC)
    t = t[None, :]
    left = tl.cast(tl.minimum(seqlen - t, run), tl.int32)  # steps of this stretch
    reach_at = reach_ptr + b * seqlen if PACKED else reach_ptr
    dp, reach = _after(x_at, dy_at, x_strides[2], dy_strides[2], reach_at, t + run, mask_d, seqlen, taps,
                       bias, WIDTH, SILU, PACKED, VEC)  # fmt: skip
    sums = _no_sums(BLOCK_D, BLOCK_G, WIDTH)
    x, dy = _before(x_at, dy_at, x_strides[2], dy_strides[2], run, t, left, mask_d, STEPS, WIDTH, UNIT, VEC)
    for first in range(run - STEPS, -1, -STEPS):
        x_at -= tl.multiple_of(tl.cast(STEPS, tl.int64) * x_strides[2], VEC)
        dy_at -= tl.multiple_of(tl.cast(STEPS, tl.int64) * dy_strides[2], VEC)
        dx_at -= tl.multiple_of(tl.cast(STEPS, tl.int64) * dx_strides[2], VEC)
        x_before, dy_before = _before(x_at, dy_at, x_strides[2], dy_strides[2], first, t, left, mask_d, STEPS,
                                      WIDTH, UNIT, VEC)  # fmt: skip
        window = enter(
            x_before[STEPS - WIDTH + 1 :],
            init_ptr,
            init_strides,
            b,
            offs_d,
            mask_d,
            t + first,
            WIDTH,
            HAS_INIT,
        )
        here, steps = (), ()
        for i in tl.static_range(STEPS):
            window += (x[i].to(tl.float32),)
            steps += (_reach_of(reach_at, t + (first + i), first + i < left, PACKED),)
            p = convolve(window, i, taps, bias, steps[i], WIDTH, PACKED)
            here += (deactivate(dy[i].to(tl.float32), p, steps[i], SILU, PACKED),)
            sums = add_sums(sums, here[i], window, i, steps[i], WIDTH, PACKED)
        dp, reach = here + dp, steps + reach
        _store_dx(dx_at, dx_strides[2], dp, reach, taps, mask_d, first, left, STEPS, WIDTH, PACKED, UNIT, VEC)
        x, dy, dp, reach = x_before, dy_before, dp[: WIDTH - 1], reach[: WIDTH - 1]
    if HAS_INIT:
        _store_dinit(dinit_ptr, dinit_strides, b, offs_d, mask_d & (t == 0), dp, reach, taps, WIDTH, PACKED)
    store_sums(sums_ptr, dweight_ptr, dbias_ptr, sums, b * tiles + tile, channels, offs_d, mask,
               WIDTH, HAS_BIAS, DIRECT)  # fmt: skip


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
