"""The forward kernels: a tile of channels by time steps is scanned in registers, one state n at a time."""

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
    scan_states,
    sigmoid,
    store_tile,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def scan_forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, table_ptr, seq_ptr, y_ptr, last_ptr,
    states_ptr,
    u_strides, delta_strides, A_strides, B_strides, C_strides, z_strides, y_strides,
    channels, seqlen, tiles, tiles_per_program, B_span, C_span,
    N: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, VARLEN: tl.constexpr, B_CONSTANT: tl.constexpr,
    C_CONSTANT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """y and the last states. states (B, tiles, D, N): a program reads its first entry, writes the others."""
    block, stretch, b, offs_d, mask_d = locate(channels, tl.cdiv(tiles, tiles_per_program), BLOCK_D)
    d = block.to(tl.int64) * BLOCK_D
    stop = min((stretch + 1) * tiles_per_program, tiles)
    bias = load_vector(bias_ptr, offs_d, mask_d, HAS_BIAS)
    skip = load_vector(D_ptr, offs_d, mask_d, HAS_D)
    for k in range(stretch * tiles_per_program, stop):
        offs_l = (k * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
        mask_l = offs_l < seqlen
        mask = mask_d[:, None] & mask_l[None, :]
        u = load_tile(u_ptr, u_strides, b, offs_d, offs_l, mask)
        Delta, _ = load_delta(delta_ptr, delta_strides, bias, b, offs_d, offs_l, mask, SOFTPLUS)
        Delta_u = Delta * u
        y = u * skip[:, None]
        start, end, row = load_edges(seq_ptr, b, seqlen, offs_l, mask_l, PACKED, VARLEN)
        state_ptrs = states_ptr + ((b * tiles + k) * channels + offs_d) * N
        final = (tl.arange(0, BLOCK_L) == BLOCK_L - 1)[None, :]
        for n in range(N):
            A2 = tl.load(A_ptr + offs_d * A_strides[0] + n * A_strides[1], mask=mask_d, other=0.0) * LOG2E
            a = tl.exp2(Delta * A2[:, None])
            x = Delta_u * load_matrix(
                B_ptr, B_strides, b, d // B_span, n, offs_d, offs_l, mask_d, mask_l, B_CONSTANT
            )
            if VARLEN and HAS_TABLE:
                at = (row * channels + offs_d[:, None]) * N + n
                h0 = tl.load(table_ptr + at, mask=mask & (start != 0), other=0.0)
                x += tl.where(start != 0, a * h0, 0.0)
            carry = tl.load(state_ptrs + n, mask=mask_d, other=0.0)
            h = scan_states(a, x, start, carry, PACKED)
            y += h * load_matrix(
                C_ptr, C_strides, b, d // C_span, n, offs_d, offs_l, mask_d, mask_l, C_CONSTANT
            )
            if VARLEN:
                tl.store(last_ptr + (row * channels + offs_d[:, None]) * N + n, h, mask=mask & (end != 0))
            elif k == tiles - 1:
                tl.store(last_ptr + (b * channels + offs_d) * N + n, pick(h, final), mask=mask_d)
            if k + 1 < stop:
                tl.store(state_ptrs + channels * N + n, pick(h, final), mask=mask_d)
        if HAS_Z:
            z = load_tile(z_ptr, z_strides, b, offs_d, offs_l, mask)
            y *= z * sigmoid(z)
        store_tile(y_ptr, y_strides, b, offs_d, offs_l, y, mask)
        tl.debug_barrier()  # the states just written are read by other threads of this program


@triton.jit
def tile_summary_kernel(
    delta_ptr, bias_ptr, A_ptr, x_ptr, gate_ptr, M_ptr, table_ptr, seq_ptr, local_ptr, total_ptr,
    delta_strides, A_strides, x_strides, gate_strides, M_strides, channels, seqlen, tiles, M_span,
    N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_TABLE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, VARLEN: tl.constexpr, M_CONSTANT: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """What each tile alone hands to its neighbour, local (B, tiles, D, N), and its ΣΔ, total (B, tiles, D).

    Forward: the end state from zero, Σ_t exp(A Σ_{s>t} Δ_s) Δ_t u_t B_t, with x = u and M = B.
    REVERSE: A_bar g at the tile's start, Σ_t exp(A Σ_{s<=t} Δ_s) C_t dy_t, with x = dy and M = C.
    """
    block, k, b, offs_d, mask_d = locate(channels, tiles, BLOCK_D)
    d = block.to(tl.int64) * BLOCK_D
    offs_l = (k * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    mask_l = offs_l < seqlen
    mask = mask_d[:, None] & mask_l[None, :]
    bias = load_vector(bias_ptr, offs_d, mask_d, HAS_BIAS)
    Delta, _ = load_delta(delta_ptr, delta_strides, bias, b, offs_d, offs_l, mask, SOFTPLUS)
    x = load_tile(x_ptr, x_strides, b, offs_d, offs_l, mask)
    if HAS_GATE:
        z = load_tile(gate_ptr, gate_strides, b, offs_d, offs_l, mask)
        x *= z * sigmoid(z)
    total = tl.sum(Delta, axis=1)
    if REVERSE:
        passed = tl.cumsum(Delta, axis=1)  # Σ_{s<=t} Δ_s
    else:  # Σ_{s>t} Δ_s from its own end: ΣΔ minus the sum so far would lose the digits of the last steps
        passed = tl.cumsum(Delta, axis=1, reverse=True) - Delta
        x *= Delta
    start, end, row = load_edges(seq_ptr, b, seqlen, offs_l, mask_l, PACKED, VARLEN)
    alive = mask
    if PACKED:
        if REVERSE:  # from the tile's start to the first end
            alive = mask & (tl.cumsum(end, axis=1) - end == 0)
        else:  # from the last start to the tile's end
            alive = mask & (tl.cumsum(start, axis=1) == tl.sum(start, axis=1)[:, None])
    out_ptrs = (b * tiles + k) * channels + offs_d
    tl.store(total_ptr + out_ptrs, total, mask=mask_d)
    for n in range(N):
        A2 = tl.load(A_ptr + offs_d * A_strides[0] + n * A_strides[1], mask=mask_d, other=0.0) * LOG2E
        term = x * load_matrix(
            M_ptr, M_strides, b, d // M_span, n, offs_d, offs_l, mask_d, mask_l, M_CONSTANT
        )
        if VARLEN and HAS_TABLE:
            edge = end if REVERSE else start
            value = tl.load(
                table_ptr + (row * channels + offs_d[:, None]) * N + n, mask=mask & (edge != 0), other=0.0
            )
            term += value if REVERSE else tl.exp2(Delta * A2[:, None]) * value
        local = tl.sum(tl.where(alive, tl.exp2(passed * A2[:, None]) * term, 0.0), axis=1)
        tl.store(local_ptr + out_ptrs * N + n, local, mask=mask_d)


@triton.jit
def chain_kernel(
    A_ptr, total_ptr, cut_ptr, local_ptr, carry_ptr, edge_ptr, A_strides, channels, tiles,
    N: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """carry (B, tiles, D, N): what enters each tile, H_{k+1} = exp(A ΣΔ_k) H_k + local_k, along the tiles.

    edge (B, D, N) enters the first tile (the last one with REVERSE). cut (B, tiles): nothing crosses.
    """
    blocks = tl.cdiv(channels * N, BLOCK)
    pid = tl.program_id(0)
    offs = ((pid % blocks) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    b, mask = (pid // blocks).to(tl.int64), offs < channels * N
    d, n = offs // N, offs % N
    A2 = tl.load(A_ptr + d * A_strides[0] + n * A_strides[1], mask=mask, other=0.0) * LOG2E
    h = tl.load(edge_ptr + b * channels * N + offs, mask=mask, other=0.0)
    for i in range(tiles):
        k = tiles - 1 - i if REVERSE else i
        tl.store(carry_ptr + (b * tiles + k) * channels * N + offs, h, mask=mask)
        local = tl.load(local_ptr + (b * tiles + k) * channels * N + offs, mask=mask, other=0.0)
        total = tl.load(total_ptr + (b * tiles + k) * channels + d, mask=mask, other=0.0)
        h_next = tl.exp2(A2 * total) * h + local
        if PACKED:
            h_next = tl.where(tl.load(cut_ptr + b * tiles + k) != 0, local, h_next)
        h = h_next
