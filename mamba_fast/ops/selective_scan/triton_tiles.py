"""Pieces shared by the Triton kernels: tiles are (BLOCK_D, BLOCK_L), channels by time steps, float32."""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + 2 atanh(s), s = w / (2 + w), w = e^-|x|; the identity above 20.

    s <= 1/3: eight terms of atanh's series are exact to float32, also where e^x is far below 1,
    where log(1 + e^x) as written would lose every digit.
    """
    w = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    s = w / (2 + w)
    q = s * s
    p = 1 / 13 + q * (1 / 15)
    p = 1 / 9 + q * (1 / 11 + q * p)
    p = 1 / 5 + q * (1 / 7 + q * p)
    p = 1 + q * (1 / 3 + q * p)
    return tl.where(x > 20, x, tl.where(x > 0, x, 0.0) + 2 * s * p)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(-x * 1.4426950408889634))


@triton.jit
def locate(channels, stretches, BLOCK_D: tl.constexpr):
    """What this program works on: block of channels, stretch of tiles, batch element, channels, their mask.

    Blocks of channels come first, so that neighbouring programs read the same B and C.
    """
    blocks = tl.cdiv(channels, BLOCK_D)
    pid = tl.program_id(0)
    block, stretch, b = pid % blocks, (pid // blocks) % stretches, (pid // (blocks * stretches)).to(tl.int64)
    offs_d = block.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    return block, stretch, b, offs_d, offs_d < channels


@triton.jit
def load_tile(ptr, strides, b, offs_d, offs_l, mask):
    """A (BLOCK_D, BLOCK_L) tile of a (B, D, L) tensor with any strides, in float32; 0 where masked."""
    offs = b * strides[0] + offs_d[:, None] * strides[1] + offs_l[None, :] * strides[2]
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, strides, b, offs_d, offs_l, value, mask):
    offs = b * strides[0] + offs_d[:, None] * strides[1] + offs_l[None, :] * strides[2]
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_delta(ptr, strides, bias, b, offs_d, offs_l, mask, SOFTPLUS: tl.constexpr):
    """Δ and dΔ/d(delta + delta_bias). Where masked Δ is 0: the decay is 1 and the state stays."""
    raw = load_tile(ptr, strides, b, offs_d, offs_l, mask) + bias[:, None]
    if SOFTPLUS:
        Delta = softplus(raw)
        slope = tl.where(raw > 20, 1.0, sigmoid(raw))
    else:
        Delta = raw
        slope = tl.full(raw.shape, 1.0, tl.float32)
    return tl.where(mask, Delta, 0.0), slope


@triton.jit
def load_vector(ptr, offs_d, mask_d, PRESENT: tl.constexpr):
    """D or delta_bias of the program's channels; zeros where the argument is absent."""
    if PRESENT:
        value = tl.load(ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    else:
        value = tl.zeros(offs_d.shape, tl.float32)
    return value


@triton.jit
def load_matrix(ptr, strides, b, group, n, offs_d, offs_l, mask_d, mask_l, CONSTANT: tl.constexpr):
    """State n of B or C: (1, BLOCK_L), shared by the program's channels, or constant (BLOCK_D, 1)."""
    if CONSTANT:
        offs = offs_d * strides[1] + n * strides[2]
        value = tl.load(ptr + offs, mask=mask_d, other=0.0)[:, None]
    else:
        offs = b * strides[0] + group * strides[1] + n * strides[2] + offs_l * strides[3]
        value = tl.load(ptr + offs, mask=mask_l, other=0.0)[None, :]
    return value.to(tl.float32)


@triton.jit
def load_edges(ptr, b, seqlen, offs_l, mask_l, PACKED: tl.constexpr, VARLEN: tl.constexpr):
    """(1, BLOCK_L): does a packed sequence start here, end here; its index. (1, 1) zeros if not PACKED."""
    if PACKED:
        row = tl.load(ptr + b * seqlen + offs_l, mask=mask_l, other=0)
        before = tl.load(ptr + b * seqlen + offs_l - 1, mask=mask_l & (offs_l > 0), other=0)
        after = tl.load(ptr + b * seqlen + offs_l + 1, mask=offs_l + 1 < seqlen, other=0)
        first, last = offs_l == 0, offs_l == seqlen - 1
        if VARLEN:
            start, end = first | (row != before), last | (row != after)
        else:
            start, end = (row != before) & (offs_l > 0), (row != after) & (offs_l < seqlen - 1)
        start, end = (start & mask_l).to(tl.int32)[None, :], (end & mask_l).to(tl.int32)[None, :]
        row = row.to(tl.int64)[None, :]
    else:
        start, end = tl.full((1, 1), 0, tl.int32), tl.full((1, 1), 0, tl.int32)
        row = tl.full((1, 1), 0, tl.int64)
    return start, end, row


@triton.jit
def _then(a1, x1, a2, x2):
    """h -> a h + x, first 1 and then 2."""
    return a1 * a2, a2 * x1 + x2


@triton.jit
def _then_cut(a1, x1, cut1, a2, x2, cut2):
    """The same where a cut forgets what comes before: a select, so that a NaN cannot pass it."""
    return tl.where(cut2 != 0, a2, a1 * a2), tl.where(cut2 != 0, x2, a2 * x1 + x2), cut1 | cut2


@triton.jit
def scan_states(a, x, start, carry, PACKED: tl.constexpr):
    """h_t = a_t h_{t-1} + x_t from `carry` (BLOCK_D,); where start_t, h_t = x_t."""
    if PACKED:
        decay, h, cut = tl.associative_scan((a, x, tl.broadcast_to(start, a.shape)), 1, _then_cut)
        h = tl.where(cut != 0, h, decay * carry[:, None] + h)
    else:
        decay, h = tl.associative_scan((a, x), 1, _then)
        h = decay * carry[:, None] + h
    return h


@triton.jit
def _then_keeping(a1, w1, x1, a2, w2, x2):
    """As `_then`, with h in two parts: x of the last step, and w, all that was there before it."""
    return a1 * a2, a2 * (w1 + x1) + w2, x2


@triton.jit
def _then_keeping_cut(a1, w1, x1, cut1, a2, w2, x2, cut2):
    cut = cut2 != 0
    return tl.where(cut, a2, a1 * a2), tl.where(cut, w2, a2 * (w1 + x1) + w2), x2, cut1 | cut2


@triton.jit
def scan_decayed(a, w, x, start, carry, PACKED: tl.constexpr):
    """w_t + a_t h_{t-1} from `carry`, where h_t is that plus x_t; where start_t, w_t alone.

    h_t - x_t would lose the digits of a_t h_{t-1} where the decay is strong.
    """
    if PACKED:
        flags = tl.broadcast_to(start, a.shape)
        decay, decayed, _, cut = tl.associative_scan((a, w, x, flags), 1, _then_keeping_cut)
        decayed = tl.where(cut != 0, decayed, decay * carry[:, None] + decayed)
    else:
        decay, decayed, _ = tl.associative_scan((a, w, x), 1, _then_keeping)
        decayed = decay * carry[:, None] + decayed
    return decayed


@triton.jit
def _before(r2, g2, a2, r1, g1, a1):
    """Put segment 1 before segment 2 of g_t = c_t + a_{t+1} g_{t+1}; a is that of a segment's first step."""
    m = r1 * a2
    return m * r2, g1 + m * g2, a1


@triton.jit
def _before_cut(r2, g2, a2, cut2, r1, g1, a1, cut1):
    m = r1 * a2
    cut = cut1 != 0
    return tl.where(cut, r1, m * r2), tl.where(cut, g1, g1 + m * g2), a1, cut1 | cut2


@triton.jit
def scan_adjoint(a, c, end, flow, PACKED: tl.constexpr):
    """g_t = c_t + a_{t+1} g_{t+1}; `flow` (BLOCK_D,) is the a g of the next tile; where end_t, g_t = c_t."""
    ones = tl.full(a.shape, 1.0, tl.float32)
    if PACKED:
        flags = tl.broadcast_to(end, a.shape)
        reach, g, _, cut = tl.associative_scan((ones, c, a, flags), 1, _before_cut, reverse=True)
        g = tl.where(cut != 0, g, reach * flow[:, None] + g)
    else:
        reach, g, _ = tl.associative_scan((ones, c, a), 1, _before, reverse=True)
        g = reach * flow[:, None] + g
    return g


@triton.jit
def pick(tile, here):
    """The column of `tile` where the (1, BLOCK_L) mask `here` holds, as (BLOCK_D,)."""
    return tl.sum(tl.where(here, tile, 0.0), axis=1)
