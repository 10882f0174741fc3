"""The forward kernel: one task scans LANES channels of one sequence, chunk by chunk."""

import numpy as np
from numba import njit, prange

from mamba_fast.ops.selective_scan.numba_math import (
    A_N,
    B_LANES,
    C_LANES,
    CHUNK,
    DELTA,
    DELTA_U,
    EXACT,
    LANES,
    LOG2E,
    ROW,
    STATE,
    F,
    H,
    Y,
    aligned,
    exp2,
    load_matrix,
    load_steps,
    sigmoid,
    steps_of,
)


@njit(fastmath=EXACT, cache=True)
def _scan_chunk(w, v, B_steps, C_steps, length, packed, start, end, row, table, last, d, n, width):
    """One state n of LANES channels over `length` steps: h = exp(Δ A) h + Δ u B, y += C h.

    In packed rows h is set where a sequence starts and kept where it ends; row < 0 has no table row.
    """
    v_n = v[n]
    for t in range(length):
        x_t = w[t]
        if packed and start[t]:
            for j in range(width):
                v_n[H + j] = table[row[t], d + j, n] if row[t] >= 0 else F(0)
        B_t, C_t = B_steps[t], C_steps[t]
        for j in range(LANES):
            a = exp2(x_t[DELTA + j] * v_n[A_N + j])
            h = a * v_n[H + j] + x_t[DELTA_U + j] * (B_t * v_n[B_LANES + j])
            v_n[H + j] = h
            x_t[Y + j] += h * (C_t * v_n[C_LANES + j])
        if packed and end[t] and row[t] >= 0:
            for j in range(width):
                last[row[t], d + j, n] = v_n[H + j]


@njit(fastmath=EXACT, cache=True)
def _store_output(y, w, rows, z, where, has_z):
    """y SiLU(z) of a chunk, or y where there is no gate."""
    for j in range(where[2]):
        out, gate = steps_of(y, where, j), rows[j]
        if has_z:
            raw = steps_of(z, where, j)
            for t in range(where[4]):
                gate[t] = raw[t] * sigmoid(raw[t])
        else:
            gate[:] = F(1)
        for t in range(where[4]):
            out[t] = w[t, Y + j] * gate[t]


@njit(parallel=True, fastmath=EXACT, cache=True)
def scan_forward(u, delta, A, B, C, D, z, delta_bias, table, start, end, row, span,
                 softplus_on, has_z, packed, varlen, B_constant, C_constant, keep,
                 y, last, states):  # fmt: skip
    """Fill y (B, D, L), last (rows, D, N) and, with keep, states (B, chunks, D, N): those entering a chunk.

    table (rows, D, N) holds the first states. `span` channels share their groups of B and C; a task
    never straddles two spans.
    """
    batch, channels, seqlen = u.shape
    d_state, per_span = A.shape[1], (span + LANES - 1) // LANES
    blocks = (channels // span) * per_span
    for task in prange(batch * blocks):
        b, block = task // blocks, task % blocks
        d = (block // per_span) * span + (block % per_span) * LANES
        width = min(LANES, (block // per_span + 1) * span - d)
        at = slice(d, d + width)
        w, v = aligned(CHUNK, ROW), aligned(d_state, STATE)
        rows, lanes = np.zeros((LANES, CHUNK), np.float32), np.zeros((2, LANES), np.float32)
        bias, skip = lanes
        B_steps, C_steps = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
        bias[:width], skip[:width] = delta_bias[at], D[at]
        for n in range(d_state):
            for j in range(width):
                v[n, A_N + j] = A[d + j, n] * LOG2E
                v[n, H + j] = F(0) if varlen else table[b, d + j, n]
        for chunk in range((seqlen + CHUNK - 1) // CHUNK):
            t0 = chunk * CHUNK
            length = min(CHUNK, seqlen - t0)
            where = (b, d, width, t0, length)
            load_steps(w, rows, u, delta, where, bias, skip, softplus_on)
            for n in range(d_state):
                if keep:
                    states[b, chunk, at, n] = v[n, H : H + width]
                load_matrix(v[n], B_LANES, B_steps, B, B_constant, b, d, n, t0, length, channels)
                load_matrix(v[n], C_LANES, C_steps, C, C_constant, b, d, n, t0, length, channels)
                _scan_chunk(w, v, B_steps, C_steps, length, packed, start[b, t0:], end[b, t0:], row[b, t0:],
                            table, last, d, n, width)  # fmt: skip
            _store_output(y, w, rows, z, where, has_z)
        if not varlen:
            for n in range(d_state):
                last[b, at, n] = v[n, H : H + width]
