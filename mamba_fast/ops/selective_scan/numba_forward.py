"""The forward kernel: one task scans LANES channels of one sequence, chunk by chunk."""

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


@njit(fastmath=EXACT, cache=True)
def _scan_chunk(h, A2, Delta, Delta_u, y, B_lanes, B_steps, C_lanes, C_steps, length,
                packed, start, end, row, table, last, d, n, width):  # fmt: skip
    """One state n of LANES channels over `length` steps: h = exp(Δ A) h + Δ u B, y += C h.

    In packed rows h is set where a sequence starts and kept where it ends; row < 0 has no table row.
    """
    for t in range(length):
        if packed and start[t]:
            for j in range(width):
                h[j] = table[row[t], d + j, n] if row[t] >= 0 else F(0)
        B_t, C_t = B_steps[t], C_steps[t]
        for j in range(LANES):
            v = exp2(Delta[t, j] * A2[j]) * h[j] + Delta_u[t, j] * (B_t * B_lanes[j])
            h[j] = v
            y[t, j] += v * (C_t * C_lanes[j])
        if packed and end[t] and row[t] >= 0:
            for j in range(width):
                last[row[t], d + j, n] = h[j]


@njit(parallel=True, fastmath=EXACT, cache=True)
def scan_forward(u, delta, A, B, C, D, z, delta_bias, table, start, end, row, span,
                 softplus_on, has_z, packed, varlen, B_constant, C_constant, keep,
                 y, last, states):  # fmt: skip
    """Fill y (B, D, L), last (rows, D, N) and, with keep, states (B, chunks, D, N): those entering a chunk.

    table (rows, D, N) holds the first states. `span` channels share their groups of B and C; a task
    never straddles two spans.
    """
    batch, channels, seqlen = u.shape
    d_state = A.shape[1]
    per_span = (span + LANES - 1) // LANES
    blocks = (channels // span) * per_span
    for task in prange(batch * blocks):
        b, block = task // blocks, task % blocks
        d = (block // per_span) * span + (block % per_span) * LANES
        width = min(LANES, (block // per_span + 1) * span - d)
        tile = np.zeros((5, CHUNK, LANES), np.float32)
        Delta, slope, u_tile, Delta_u, out = tile[0], tile[1], tile[2], tile[3], tile[4]
        h, A2 = np.zeros((d_state, LANES), np.float32), np.zeros((d_state, LANES), np.float32)
        bias, skip = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        B_lanes, C_lanes = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        B_steps, C_steps = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
        for j in range(width):
            bias[j], skip[j] = delta_bias[d + j], D[d + j]
            for n in range(d_state):
                A2[n, j] = A[d + j, n] * LOG2E
                h[n, j] = F(0) if varlen else table[b, d + j, n]
        for chunk in range((seqlen + CHUNK - 1) // CHUNK):
            t0 = chunk * CHUNK
            length = min(CHUNK, seqlen - t0)
            load_tile(u_tile, u[b, d : d + width, t0 : t0 + length])
            load_delta(Delta, slope, delta[b, d : d + width, t0 : t0 + length], bias, softplus_on)
            for t in range(length):
                for j in range(LANES):
                    Delta_u[t, j] = Delta[t, j] * u_tile[t, j]
                    out[t, j] = u_tile[t, j] * skip[j]
            for n in range(d_state):
                if keep:
                    states[b, chunk, d : d + width, n] = h[n, :width]
                load_matrix(B_lanes, B_steps, B, B_constant, b, d, n, t0, length, channels)
                load_matrix(C_lanes, C_steps, C, C_constant, b, d, n, t0, length, channels)
                _scan_chunk(h[n], A2[n], Delta, Delta_u, out, B_lanes, B_steps, C_lanes, C_steps, length,
                            packed, start[b, t0:], end[b, t0:], row[b, t0:], table, last, d, n,
                            width)  # fmt: skip
            if has_z:
                load_tile(u_tile, z[b, d : d + width, t0 : t0 + length])
                for t in range(length):
                    for j in range(LANES):
                        out[t, j] *= u_tile[t, j] * sigmoid(u_tile[t, j])
            store_tile(y[b, d : d + width, t0 : t0 + length], out)
        if not varlen:
            for j in range(width):
                last[b, d + j] = h[:, j]
