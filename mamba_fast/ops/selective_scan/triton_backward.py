"""The backward kernel: for each tile and state n, find h again from the first state, then run the adjoint."""

import triton
import triton.language as tl

from mamba_fast.ops.selective_scan.triton_tiles import (
    load_delta,
    load_edges,
    load_matrix,
    load_tile,
    load_vector,
    locate,
    pick,
    scan_adjoint,
    scan_decayed,
    sigmoid,
    store_tile,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_matrix_grad(
    ptr, strides, slot, at, b, group, n, offs_l, mask_d, mask_l, value, CONSTANT: tl.constexpr
):
    """dB or dC of one n: summed over channels into its slot, or over time into (B, tiles, D, N)."""
    if CONSTANT:
        tl.store(ptr + at + n, tl.sum(value, axis=1), mask=mask_d)
    else:
        to = slot * strides[0] + b * strides[1] + group * strides[2] + n * strides[3] + offs_l
        tl.atomic_add(ptr + to, tl.sum(value, axis=0), mask=mask_l, sem="relaxed")


@triton.jit
def _one_state(
    n, a, x, c, y, dBu, ddelta, A_n, B_n, C_n, start, end, row, at, offs_d, mask_d, mask, k, first_tile, b,
    channels,
    table_ptr, dlast_ptr, states_ptr, flows_ptr, dtable_ptr,
    N: tl.constexpr, HAS_TABLE: tl.constexpr, PACKED: tl.constexpr, VARLEN: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """State n of a tile: h and g; what n adds to y, d(B u) and, through the decay, ddelta."""
    from_table = tl.zeros_like(a)
    table = (row * channels + offs_d[:, None]) * N + n
    if VARLEN:
        if HAS_TABLE:
            from_table = a * tl.load(table_ptr + table, mask=mask & (start != 0), other=0.0)
        c += tl.load(dlast_ptr + table, mask=mask & (end != 0), other=0.0)
    carry = tl.load(states_ptr + at + n, mask=mask_d, other=0.0)
    decayed = scan_decayed(a, from_table, x, start, carry, PACKED)  # A_bar_t h_{t-1}
    h = decayed + x
    flow = tl.load(flows_ptr + at + n, mask=mask_d, other=0.0)
    g = scan_adjoint(a, c, end, flow, PACKED)
    first = tl.arange(0, BLOCK_L)[None, :] == 0
    if VARLEN:
        tl.store(dtable_ptr + table, a * g, mask=mask & (start != 0))
    elif k == 0:
        tl.store(dtable_ptr + (b * channels + offs_d) * N + n, pick(a * g, first), mask=mask_d)
    if k > first_tile:
        tl.store(flows_ptr + at - channels * N + n, pick(a * g, first), mask=mask_d)
    through_decay = g * decayed
    return y + h * C_n, dBu + g * B_n, ddelta + through_decay * A_n, through_decay, g, h


@triton.jit
def _finish_tile(
    u, dy, y, dBu, ddelta, Delta, slope, skip, z, dout, part, b, offs_d, offs_l, mask_d, mask,
    du_ptr, ddelta_ptr, dz_ptr, y_ptr, dD_ptr, dbias_ptr, du_strides, ddelta_strides, dz_strides, y_strides,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Turn the sums over n into du, ddelta, dz and y if asked; store the share of dD and ddelta_bias."""
    if HAS_Z:
        s = sigmoid(z)
        store_tile(dz_ptr, dz_strides, b, offs_d, offs_l, dout * y * s * (1 + z * (1 - s)), mask)
        if y_ptr is not None:
            store_tile(y_ptr, y_strides, b, offs_d, offs_l, y * z * s, mask)
    ddelta = (ddelta + dBu * u) * slope
    store_tile(du_ptr, du_strides, b, offs_d, offs_l, dBu * Delta + dy * skip[:, None], mask)
    store_tile(ddelta_ptr, ddelta_strides, b, offs_d, offs_l, ddelta, mask)
    if HAS_D:
        tl.store(dD_ptr + part, tl.sum(dy * u, axis=1), mask=mask_d)
    if HAS_BIAS:
        tl.store(dbias_ptr + part, tl.sum(tl.where(mask, ddelta, 0.0), axis=1), mask=mask_d)


@triton.jit
def scan_backward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, table_ptr, seq_ptr, dy_ptr, dlast_ptr,
    states_ptr, flows_ptr, du_ptr, ddelta_ptr, dz_ptr, y_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr,
    dtable_ptr,
    u_strides, delta_strides, A_strides, B_strides, C_strides, z_strides, dy_strides, du_strides,
    ddelta_strides,
    dz_strides, y_strides, dB_strides, dC_strides, channels, seqlen, tiles, tiles_per_program, B_span, C_span,
    slots,
    N: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, VARLEN: tl.constexpr, B_CONSTANT: tl.constexpr,
    C_CONSTANT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Every gradient. states and flows (B, tiles, D, N) hold what enters a tile from its left and its right.

    The adjoint is g_t = C_t dy_t + flow_t with flow_t = A_bar_{t+1} g_{t+1}.
    """
    block, stretch, b, offs_d, mask_d = locate(channels, tl.cdiv(tiles, tiles_per_program), BLOCK_D)
    d, first_tile = block.to(tl.int64) * BLOCK_D, stretch * tiles_per_program
    bias = load_vector(bias_ptr, offs_d, mask_d, HAS_BIAS)
    skip = load_vector(D_ptr, offs_d, mask_d, HAS_D)
    for i in range(min(tiles_per_program, tiles - first_tile)):
        k = min(first_tile + tiles_per_program, tiles) - 1 - i
        offs_l = (k * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
        mask_l = offs_l < seqlen
        mask = mask_d[:, None] & mask_l[None, :]
        u = load_tile(u_ptr, u_strides, b, offs_d, offs_l, mask)
        Delta, slope = load_delta(delta_ptr, delta_strides, bias, b, offs_d, offs_l, mask, SOFTPLUS)
        dout = load_tile(dy_ptr, dy_strides, b, offs_d, offs_l, mask)
        dy, z = dout, dout
        if HAS_Z:
            z = load_tile(z_ptr, z_strides, b, offs_d, offs_l, mask)
            dy = dout * z * sigmoid(z)
        y, dBu, ddelta = u * skip[:, None], tl.zeros_like(u), tl.zeros_like(u)
        start, end, row = load_edges(seq_ptr, b, seqlen, offs_l, mask_l, PACKED, VARLEN)
        at = ((b * tiles + k) * channels + offs_d) * N
        for n in range(N):
            A_n = tl.load(A_ptr + offs_d * A_strides[0] + n * A_strides[1], mask=mask_d, other=0.0)[:, None]
            B_n = load_matrix(B_ptr, B_strides, b, d // B_span, n, offs_d, offs_l, mask_d, mask_l, B_CONSTANT)
            C_n = load_matrix(C_ptr, C_strides, b, d // C_span, n, offs_d, offs_l, mask_d, mask_l, C_CONSTANT)
            y, dBu, ddelta, through_decay, g, h = _one_state(
                n, tl.exp2(Delta * (A_n * LOG2E)), Delta * u * B_n, dy * C_n, y, dBu, ddelta, A_n, B_n, C_n,
                start, end, row, at, offs_d, mask_d, mask, k, first_tile, b, channels,
                table_ptr, dlast_ptr, states_ptr, flows_ptr, dtable_ptr, N, HAS_TABLE, PACKED, VARLEN,
                BLOCK_L,
            )  # fmt: skip
            tl.store(dA_ptr + at + n, tl.sum(through_decay * Delta, axis=1), mask=mask_d)
            _add_matrix_grad(dB_ptr, dB_strides, block % slots, at, b, d // B_span, n, offs_l, mask_d, mask_l,
                             g * Delta * u, B_CONSTANT)  # fmt: skip
            _add_matrix_grad(dC_ptr, dC_strides, block % slots, at, b, d // C_span, n, offs_l, mask_d, mask_l,
                             dy * h, C_CONSTANT)  # fmt: skip
        part = (b * tiles + k) * channels + offs_d
        _finish_tile(u, dy, y, dBu, ddelta, Delta, slope, skip, z, dout, part, b, offs_d, offs_l, mask_d,
                     mask,
                     du_ptr, ddelta_ptr, dz_ptr, y_ptr, dD_ptr, dbias_ptr, du_strides, ddelta_strides,
                     dz_strides, y_strides, HAS_D, HAS_Z, HAS_BIAS)  # fmt: skip
        tl.debug_barrier()  # the flows just written are read by other threads of this program
