"""The backward kernel: chunks in reverse, states recomputed from the one saved at each chunk's start."""

import numpy as np
from numba import njit, prange

from mamba_fast.ops.selective_scan.numba_math import (
    CHUNK,
    EXACT,
    LANES,
    LOG2E,
    F,
    exp2,
    load_delta,
    load_matrix,
    load_tile,
    sigmoid,
    store_tile,
)

# Sums over the LANES channels may be taken in any order, which is what lets them become SIMD.
SUMS = {"contract", "reassoc"}


@njit(fastmath=EXACT, cache=True)
def _recompute(h, A2, Delta, Delta_u, B_lanes, B_steps, decay, h_prev, h_all, length,
               packed, start, row, table, d, n, width):  # fmt: skip
    """Decay, state before and state after every step of a chunk, for one n: tiles (CHUNK, LANES)."""
    for t in range(length):
        if packed and start[t]:
            for j in range(width):
                h[j] = table[row[t], d + j, n] if row[t] >= 0 else F(0)
        B_t = B_steps[t]
        for j in range(LANES):
            a = exp2(Delta[t, j] * A2[j])
            v = a * h[j] + Delta_u[t, j] * (B_t * B_lanes[j])
            decay[t, j], h_prev[t, j], h_all[t, j], h[j] = a, h[j], v, v


@njit(fastmath=SUMS, cache=True)
def _reverse(flow, A_n, Delta, Delta_u, dy, decay, h_prev, h_all, B_lanes, B_steps, C_lanes, C_steps,
             y, ddelta, dBu, dA, dB_lanes, dC_lanes, dB_steps, dC_steps, length,
             packed, varlen, start, end, row, dlast, dtable, d, n, width):  # fmt: skip
    """The adjoint g_t = C_t dy_t + flow, flow = A_bar_t g_t, and all that one n adds to the gradients."""
    for t in range(length - 1, -1, -1):
        if packed and end[t]:  # nothing flows back from the next sequence, only from this one's last state
            for j in range(width):
                flow[j] = dlast[row[t], d + j, n] if row[t] >= 0 else F(0)
        B_t, C_t, sum_B, sum_C = B_steps[t], C_steps[t], F(0), F(0)
        for j in range(LANES):
            C_j, B_j = C_t * C_lanes[j], B_t * B_lanes[j]
            g = dy[t, j] * C_j + flow[j]
            y[t, j] += h_all[t, j] * C_j
            back = g * decay[t, j]
            through_decay = back * h_prev[t, j]
            dA[j] += through_decay * Delta[t, j]
            ddelta[t, j] += through_decay * A_n[j]
            dBu[t, j] += g * B_j
            flow[j] = back
            to_B, to_C = g * Delta_u[t, j], dy[t, j] * h_all[t, j]
            dB_lanes[j] += to_B
            dC_lanes[j] += to_C
            sum_B += to_B
            sum_C += to_C
        dB_steps[t] += sum_B
        dC_steps[t] += sum_C
        if packed and varlen and start[t]:
            for j in range(width):
                dtable[row[t], d + j, n] = flow[j]


@njit(fastmath=EXACT, cache=True)
def _load_chunk(tiles, u, delta, z, dy, D, bias, softplus_on, has_z, length):
    """Fill Δ, dΔ, u, Δu, dy (before the gate), y (so far D u), z and dout; clear the accumulators."""
    Delta, slope, u_tile, Delta_u, dy_tile, y, z_tile, dout = tiles[:8]
    load_tile(u_tile, u)
    load_delta(Delta, slope, delta, bias, softplus_on)
    load_tile(dout, dy)
    if has_z:
        load_tile(z_tile, z)
    for t in range(length):
        for j in range(LANES):
            gate = z_tile[t, j] * sigmoid(z_tile[t, j]) if has_z else F(1)
            Delta_u[t, j] = Delta[t, j] * u_tile[t, j]
            dy_tile[t, j] = dout[t, j] * gate
            y[t, j] = u_tile[t, j] * D[j]
    tiles[8:10] = F(0)  # ddelta through the decay, d(B u)


@njit(fastmath=EXACT, cache=True)
def _finish_chunk(tiles, D, has_z, length, width, du, ddelta, dz, dD, dbias):
    """Turn the sums over n into du, ddelta, dz and add this chunk's share to dD and ddelta_bias."""
    Delta, slope, u_tile, _, dy, y, z_tile, dout, through_decay, dBu = tiles[:10]
    for t in range(length):
        for j in range(width):
            dD[j] += dy[t, j] * u_tile[t, j]
            step = (through_decay[t, j] + dBu[t, j] * u_tile[t, j]) * slope[t, j]
            dbias[j] += step
            through_decay[t, j] = step
            dBu[t, j] = dBu[t, j] * Delta[t, j] + dy[t, j] * D[j]
            s = sigmoid(z_tile[t, j])
            dout[t, j] *= y[t, j] * s * (F(1) + z_tile[t, j] * (F(1) - s))
    store_tile(du, dBu)
    store_tile(ddelta, through_decay)
    if has_z:
        store_tile(dz, dout)


@njit(parallel=True, fastmath=EXACT, cache=True)
def scan_backward(dy, dlast, u, delta, A, B, C, D, z, delta_bias, table, states, start, end, row, span,
                  pieces,
                  softplus_on, has_z, packed, varlen, B_constant, C_constant,
                  du, ddelta, dA, dB, dC, dB_constant, dC_constant, dD, dz, dbias, dtable):  # fmt: skip
    """Fill every gradient; dB, dC are (B, spans, pieces, N, L): one slot a task, summed by the caller."""
    batch, channels, seqlen = u.shape
    d_state, spans, per_span = A.shape[1], channels // span, (span + LANES - 1) // LANES
    for task in prange(batch * spans * pieces):
        b, s, piece = task // (spans * pieces), task // pieces % spans, task % pieces
        tiles, lanes = np.zeros((13, CHUNK, LANES), np.float32), np.zeros((6, LANES), np.float32)
        decay, h_prev, h_all = tiles[10], tiles[11], tiles[12]
        skip, bias, B_lanes, C_lanes, dD_lanes, dbias_lanes = lanes
        B_steps, C_steps = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
        for block in range(piece, per_span, pieces):
            d = s * span + block * LANES
            width = min(LANES, (s + 1) * span - d)
            A_n, flow, dA_n, dB_n, dC_n = np.zeros((5, d_state, LANES), np.float32)
            lanes[:] = F(0)
            skip[:width], bias[:width] = D[d : d + width], delta_bias[d : d + width]
            for j in range(width):
                for n in range(d_state):
                    A_n[n, j] = A[d + j, n]
                    flow[n, j] = F(0) if varlen else dlast[b, d + j, n]
            for chunk in range((seqlen + CHUNK - 1) // CHUNK - 1, -1, -1):
                t0 = chunk * CHUNK
                here = slice(t0, min(t0 + CHUNK, seqlen))
                length = here.stop - t0
                at = slice(d, d + width)
                _load_chunk(tiles, u[b, at, here], delta[b, at, here], z[b, at, here], dy[b, at, here], skip,
                            bias,
                            softplus_on, has_z, length)  # fmt: skip
                for n in range(d_state):
                    load_matrix(B_lanes, B_steps, B, B_constant, b, d, n, t0, length, channels)
                    load_matrix(C_lanes, C_steps, C, C_constant, b, d, n, t0, length, channels)
                    h = np.zeros(LANES, np.float32)
                    h[:width] = states[b, chunk, at, n]
                    _recompute(h, A_n[n] * LOG2E, tiles[0], tiles[3], B_lanes, B_steps, decay, h_prev, h_all,
                               length, packed, start[b, t0:], row[b, t0:], table, d, n, width)  # fmt: skip
                    _reverse(flow[n], A_n[n], tiles[0], tiles[3], tiles[4], decay, h_prev, h_all,
                             B_lanes, B_steps, C_lanes, C_steps, tiles[5], tiles[8], tiles[9],
                             dA_n[n], dB_n[n], dC_n[n], dB[b, s, piece, n, here], dC[b, s, piece, n, here],
                             length,
                             packed, varlen, start[b, t0:], end[b, t0:], row[b, t0:], dlast, dtable, d, n,
                             width)  # fmt: skip
                _finish_chunk(tiles, skip, has_z, length, width, du[b, at, here], ddelta[b, at, here],
                              dz[b, at, here], dD_lanes, dbias_lanes)  # fmt: skip
            for j in range(width):
                dD[b, d + j], dbias[b, d + j] = dD_lanes[j], dbias_lanes[j]
                dA[b, d + j] = dA_n[:, j]
                dB_constant[b, d + j], dC_constant[b, d + j] = dB_n[:, j], dC_n[:, j]
                if not varlen:
                    dtable[b, d + j] = flow[:, j]
