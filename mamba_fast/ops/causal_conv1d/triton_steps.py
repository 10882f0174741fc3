"""Pieces shared by the Triton kernels. A tile is (BLOCK_D, BLOCK_G): channels by groups of STEPS time steps.

A group is a tuple of tiles, one a step. So the steps beside a step are in the same thread, and the sum
over taps moves nothing between threads.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) as the square of 1 / sqrt: an instruction of the GPU, where a division takes five."""
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2E))  # -x would be a subtraction from 0
    return root * root


@triton.jit
def locate(tiles, blocks, BLOCK_D: tl.constexpr):
    """What this program works on: tile in time, batch element, channels. Neighbours in time come first."""
    pid = tl.cast(tl.program_id(0), tl.uint32)  # dividing without a sign is shorter
    tiles, blocks = tl.cast(tiles, tl.uint32), tl.cast(blocks, tl.uint32)
    row = pid // tiles
    b = row // blocks
    offs_d = (row - b * blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    return (pid - row * tiles).to(tl.int64), b.to(tl.int64), offs_d


@triton.jit
def inside(offs, size, VEC: tl.constexpr):
    """offs < size, where size is a multiple of VEC: VEC numbers are then seen to share their mask."""
    return offs // VEC < tl.cdiv(size, VEC)


@triton.jit
def split_steps(tile, STEPS: tl.constexpr):
    """(BLOCK_D, BLOCK_G, STEPS) as STEPS tiles (BLOCK_D, BLOCK_G); STEPS is 4 or 8."""
    BLOCK_D: tl.constexpr = tile.shape[0]
    BLOCK_G: tl.constexpr = tile.shape[1]
    if STEPS == 8:
        even, odd = tl.split(tile.reshape(BLOCK_D, BLOCK_G, 2, 2, 2))
        s04, s26 = tl.split(even)
        s15, s37 = tl.split(odd)
        s0, s4 = tl.split(s04)
        s1, s5 = tl.split(s15)
        s2, s6 = tl.split(s26)
        s3, s7 = tl.split(s37)
        steps = (s0, s1, s2, s3, s4, s5, s6, s7)
    else:
        even, odd = tl.split(tile.reshape(BLOCK_D, BLOCK_G, 2, 2))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        steps = (s0, s1, s2, s3)
    return steps


@triton.jit
def join_steps(s, STEPS: tl.constexpr):
    """STEPS tiles (BLOCK_D, BLOCK_G) as one (BLOCK_D, BLOCK_G, STEPS)."""
    BLOCK_D: tl.constexpr = s[0].shape[0]
    BLOCK_G: tl.constexpr = s[0].shape[1]
    if STEPS == 8:
        even = tl.join(tl.join(s[0], s[4]), tl.join(s[2], s[6]))
        odd = tl.join(tl.join(s[1], s[5]), tl.join(s[3], s[7]))
    else:
        even, odd = tl.join(s[0], s[2]), tl.join(s[1], s[3])
    return tl.join(even, odd).reshape(BLOCK_D, BLOCK_G, STEPS)


@triton.jit
def offsets(tile, BLOCK_G: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr):
    """(1, BLOCK_G, UNIT): the first UNIT steps of every group of STEPS; UNIT of them are one access."""
    groups = (tile * BLOCK_G + tl.arange(0, BLOCK_G)) * STEPS
    return (groups[:, None] + tl.arange(0, UNIT)[None, :])[None, :, :]


@triton.jit
def load_groups(
    ptr, stride, offs_l, mask_d, seqlen, other, STEPS: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr
):
    """STEPS tiles (BLOCK_D, BLOCK_G) of a tensor whose time steps lie side by side.

    ptr (BLOCK_D, 1, 1) points to the first step of each channel. `other` where there is no such step.
    """
    steps = ()
    for k in tl.static_range(0, STEPS, UNIT):
        offs = offs_l + k
        mask = mask_d[:, :, None] & inside(offs, seqlen, VEC) & (offs >= 0)
        steps += split_steps(tl.load(ptr + offs * stride, mask=mask, other=other), UNIT)
    return steps


@triton.jit
def store_groups(
    ptr, stride, offs_l, mask_d, seqlen, steps, STEPS: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr
):
    """The reverse of `load_groups`."""
    for k in tl.static_range(0, STEPS, UNIT):
        mask = mask_d[:, :, None] & inside(offs_l + k, seqlen, VEC)
        tl.store(ptr + (offs_l + k) * stride, join_steps(steps[k : k + UNIT], UNIT), mask=mask)


@triton.jit
def columns_at(ptr, b, offs_d, t, strides, VEC: tl.constexpr):
    """(BLOCK_D, BLOCK_G) addresses of a tensor whose channels lie side by side; t is (BLOCK_G,)."""
    first = ptr + tl.multiple_of(b * strides[0], VEC) + offs_d[:, None] * strides[1]
    return first + tl.multiple_of(t * strides[2], VEC)[None, :]


@triton.jit
def load_weight(
    weight_ptr, strides, bias_ptr, offs_d, mask_d, SCALE: tl.constexpr, WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """SCALE times the taps of the program's channels, oldest first, and bias: (BLOCK_D, 1) each, float32."""
    taps = ()
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + offs_d * strides[0] + k * strides[1], mask=mask_d, other=0.0)
        taps += (tap.to(tl.float32)[:, None] * SCALE,)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(offs_d.shape, tl.float32)
    return taps, bias[:, None] * SCALE


@triton.jit
def enter(past, init_ptr, strides, b, offs_d, mask_d, starts, WIDTH: tl.constexpr, HAS_INIT: tl.constexpr):
    """The WIDTH - 1 tiles before a group: where it starts the sequence, the initial states.

    starts (1, BLOCK_G): the first step of each group.
    """
    steps = ()
    for k in tl.static_range(WIDTH - 1):
        x = past[k].to(tl.float32)
        if HAS_INIT:
            at = init_ptr + b * strides[0] + offs_d[:, None] * strides[1] + k * strides[2]
            first = starts == 0
            state = tl.load(at + tl.zeros_like(starts), mask=mask_d & first, other=0.0)
            x = tl.where(first, state.to(tl.float32), x)
        steps += (x,)
    return steps


@triton.jit
def convolve(window, i: tl.constexpr, taps, bias, reach, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """p_t = bias + sum_j w_{WIDTH-1-j} x_{t-j}, where x_t is window[i + WIDTH - 1]. PACKED: j <= reach_t."""
    p = taps[WIDTH - 1] * window[i + WIDTH - 1] + bias
    for j in tl.static_range(1, WIDTH):
        x = window[i + WIDTH - 1 - j]
        if PACKED:
            x = tl.where(reach >= j, x, 0.0)
        p += taps[WIDTH - 1 - j] * x
    return p


@triton.jit
def activate(p, reach, SILU: tl.constexpr, PACKED: tl.constexpr):
    """y from p; SILU: from log2(e) p, which saves a product, by p σ(p) = log2(e) p / (log2(e) (1 + e^-p))."""
    y = p
    if SILU:
        root = tl.rsqrt(tl.exp2(p * -1.0) * LOG2E + LOG2E)
        y = p * (root * root)
    if PACKED:
        y = tl.where(reach < 0, 0.0, y)
    return y


@triton.jit
def deactivate(dy, p, reach, SILU: tl.constexpr, PACKED: tl.constexpr):
    """The gradient of p from that of y."""
    dp = dy
    if SILU:
        s = sigmoid(p)
        dp = dy * (p * (s - s * s) + s)
    if PACKED:
        dp = tl.where(reach < 0, 0.0, dp)
    return dp


@triton.jit
def correlate(dp, i: tl.constexpr, reach, taps, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """dx_t = sum_j w_{WIDTH-1-j} dp_{t+j}, where dp_t is dp[i]. PACKED: j <= reach_{t+j}."""
    dx = taps[WIDTH - 1] * dp[i]
    for j in tl.static_range(1, WIDTH):
        part = dp[i + j]
        if PACKED:
            part = tl.where(reach[i + j] >= j, part, 0.0)
        dx += taps[WIDTH - 1 - j] * part
    return dx


@triton.jit
def add_sums(sums, dp, window, i: tl.constexpr, reach, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """Add step t's share: dp_t x_{t-j} to the gradient of tap WIDTH-1-j, and dp_t to that of the bias."""
    added = ()
    for k in tl.static_range(WIDTH):
        x = window[i + k]
        if PACKED:
            x = tl.where(reach >= WIDTH - 1 - k, x, 0.0)
        added += (sums[k] + dp * x,)
    added += (sums[WIDTH] + dp,)
    return added


@triton.jit
def store_sums(
    sums_ptr, dweight_ptr, dbias_ptr, sums, part, channels, offs_d, mask_d,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """dweight and dbias, if the program has seen all of its channels (DIRECT).

    Else its share of them: row `part` of (parts, WIDTH + 1, D).
    """
    for k in tl.static_range(WIDTH + 1):
        total = tl.sum(sums[k], axis=1)
        if not DIRECT:
            tl.store(sums_ptr + (part * (WIDTH + 1) + k) * channels + offs_d, total, mask=mask_d)
        elif k < WIDTH:
            tl.store(dweight_ptr + offs_d * WIDTH + k, total.to(dweight_ptr.dtype.element_ty), mask=mask_d)
        elif HAS_BIAS:
            tl.store(dbias_ptr + offs_d, total.to(dbias_ptr.dtype.element_ty), mask=mask_d)
