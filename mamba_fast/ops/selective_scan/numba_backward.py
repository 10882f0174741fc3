"""The backward kernel: chunks in reverse, states recomputed from the one saved at each chunk's start."""

import numpy as np
from numba import njit, prange

from mamba_fast.ops.selective_scan.numba_math import (
    A_N,
    B_LANES,
    BY_DECAY,
    C_LANES,
    CHUNK,
    DA,
    DB,
    DBU,
    DC,
    DECAY,
    DELTA,
    DELTA_U,
    DY,
    EXACT,
    H_PREV,
    LANES,
    LOG2E,
    ROW,
    STATE,
    F,
    H,
    U,
    Y,
    aligned,
    exp2,
    load_matrix,
    load_steps,
    sigmoid,
    spread,
    steps_of,
)

# Sums over the LANES channels may be taken in any order, which is what lets them become SIMD.
SUMS = {"contract", "reassoc"}


@njit(fastmath=EXACT, cache=True)
def _recompute(h, w, v, B_steps, length, packed, start, row, table, d, n, width):
    """A_bar_t and h_{t-1} of every step of a chunk, for one state n, from h (LANES,)."""
    v_n = v[n]
    for t in range(length):
        x_t = w[t]
        if packed and start[t]:
            for j in range(width):
                h[j] = table[row[t], d + j, n] if row[t] >= 0 else F(0)
        B_t = B_steps[t]
        for j in range(LANES):
            a = exp2(x_t[DELTA + j] * (v_n[A_N + j] * LOG2E))
            x_t[DECAY + j], x_t[H_PREV + j] = a, h[j]
            h[j] = a * h[j] + x_t[DELTA_U + j] * (B_t * v_n[B_LANES + j])


@njit(fastmath=SUMS, cache=True)
def _reverse(w, v, B_steps, C_steps, dB_steps, dC_steps, backwards, length,
             packed, varlen, start, end, row, dlast, dtable, d, n, width):  # fmt: skip
    """The adjoint g_t = C_t dy_t + flow, flow = A_bar_t g_t, and all that one n adds to the gradients.

    `backwards` holds CHUNK - 1, ..., 0: LLVM takes no SIMD for rows that it can see go backwards in
    memory, and cannot see it when the row number is read from an array.
    """
    v_n = v[n]
    for i in range(CHUNK - length, CHUNK):
        t = backwards[i]
        x_t = w[t]
        if packed and end[t]:  # nothing flows back from the next sequence, only from this one's last state
            for j in range(width):
                v_n[H + j] = dlast[row[t], d + j, n] if row[t] >= 0 else F(0)
        B_t, C_t, sum_B, sum_C = B_steps[t], C_steps[t], F(0), F(0)
        for j in range(LANES):
            B_j, C_j = B_t * v_n[B_LANES + j], C_t * v_n[C_LANES + j]
            decayed = x_t[DECAY + j] * x_t[H_PREV + j]
            h = decayed + x_t[DELTA_U + j] * B_j
            g = x_t[DY + j] * C_j + v_n[H + j]
            x_t[Y + j] += h * C_j
            x_t[DBU + j] += g * B_j
            x_t[BY_DECAY + j] += g * decayed * v_n[A_N + j]
            v_n[DA + j] += g * decayed * x_t[DELTA + j]
            v_n[H + j] = g * x_t[DECAY + j]
            to_B, to_C = g * x_t[DELTA_U + j], x_t[DY + j] * h
            v_n[DB + j] += to_B
            v_n[DC + j] += to_C
            sum_B += to_B
            sum_C += to_C
        dB_steps[t] += sum_B
        dC_steps[t] += sum_C
        if packed and varlen and start[t]:
            for j in range(width):
                dtable[row[t], d + j, n] = v_n[H + j]


@njit(fastmath=EXACT, cache=True)
def _load_chunk(w, rows, u, delta, z, dy, where, bias, D, softplus_on, has_z):
    """All of a chunk that does not depend on n. rows: scratch, dΔ/d(delta), d(y SiLU(z))/dz dy / y."""
    length, scratch = where[4], rows[0]
    load_steps(w, scratch, u, delta, where, bias, D, softplus_on)
    for j in range(where[2]):
        raw, out, gated = steps_of(delta, where, j), steps_of(dy, where, j), scratch[j]
        slope, to_z = rows[1, j], rows[2, j]
        if softplus_on:
            for t in range(length):
                slope[t] = sigmoid(raw[t] + bias[j])  # 1 from 17 on, so also above the threshold
        else:
            slope[:] = F(1)
        if has_z:
            gate = steps_of(z, where, j)
            for t in range(length):
                s = sigmoid(gate[t])
                gated[t] = out[t] * (gate[t] * s)
                to_z[t] = out[t] * s * (F(1) + gate[t] * (F(1) - s))
        else:
            gated[:length] = out
    spread(w, DY, scratch, where)
    for t in range(length):
        w[t, BY_DECAY : BY_DECAY + LANES] = F(0)
        w[t, DBU : DBU + LANES] = F(0)


@njit(fastmath=SUMS, cache=True)
def _finish_chunk(w, rows, D, where, z, has_z, du, ddelta, dz, y, dD, dbias):
    """Turn the sums over n into du, ddelta, dz and y, which may be empty; add to dD and ddelta_bias."""
    length = where[4]
    for t in range(length):
        x_t = w[t]
        for j in range(LANES):
            x_t[BY_DECAY + j] += x_t[DBU + j] * x_t[U + j]
            x_t[DBU + j] = x_t[DBU + j] * x_t[DELTA + j] + x_t[DY + j] * D[j]
            dD[j] += x_t[DY + j] * x_t[U + j]
    for j in range(where[2]):
        to_u, to_delta, slope = steps_of(du, where, j), steps_of(ddelta, where, j), rows[1, j]
        for t in range(length):
            to_u[t] = w[t, DBU + j]
            to_delta[t] = w[t, BY_DECAY + j] * slope[t]
            dbias[j] += to_delta[t]
        if has_z:
            to_z, factor = steps_of(dz, where, j), rows[2, j]
            for t in range(length):
                to_z[t] = w[t, Y + j] * factor[t]
            if y.size > 0:
                gate, gated = steps_of(z, where, j), steps_of(y, where, j)
                for t in range(length):
                    gated[t] = w[t, Y + j] * (gate[t] * sigmoid(gate[t]))


@njit(parallel=True, fastmath=EXACT, cache=True)
def scan_backward(dy, dlast, u, delta, A, B, C, D, z, delta_bias, table, states, start, end, row, span,
                  pieces, softplus_on, has_z, packed, varlen, B_constant, C_constant,
                  du, ddelta, dA, dB, dC, dB_constant, dC_constant, dD, dz, y, dbias, dtable):  # fmt: skip
    """Fill every gradient; dB, dC are (B, spans, pieces, N, L): one slot a task, summed by the caller."""
    batch, channels, seqlen = u.shape
    d_state, spans, per_span = A.shape[1], channels // span, (span + LANES - 1) // LANES
    for task in prange(batch * spans * pieces):
        b, group, piece = task // (spans * pieces), task // pieces % spans, task % pieces
        w, lanes = aligned(CHUNK, ROW), np.zeros((4, LANES), np.float32)
        h = aligned(1, LANES)[0]
        rows = np.zeros((3, LANES, CHUNK), np.float32)
        skip, bias, dD_lanes, dbias_lanes = lanes[0], lanes[1], lanes[2], lanes[3]
        B_steps, C_steps = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
        backwards, dB_task, dC_task = np.arange(CHUNK - 1, -1, -1), dB[b, group, piece], dC[b, group, piece]
        for block in range(piece, per_span, pieces):
            d = group * span + block * LANES
            width = min(LANES, (group + 1) * span - d)
            at = slice(d, d + width)
            v = aligned(d_state, STATE)
            lanes[:], w[:], h[:] = F(0), F(0), F(0)  # lanes beyond `width` enter the sums over lanes
            skip[:width], bias[:width] = D[at], delta_bias[at]
            for n in range(d_state):
                for j in range(width):
                    v[n, A_N + j] = A[d + j, n]
                    v[n, H + j] = F(0) if varlen else dlast[b, d + j, n]
            for chunk in range((seqlen + CHUNK - 1) // CHUNK - 1, -1, -1):
                t0 = chunk * CHUNK
                length = min(CHUNK, seqlen - t0)
                here, where = slice(t0, t0 + length), (b, d, width, t0, length)
                edges = start[b, t0:], end[b, t0:], row[b, t0:]
                _load_chunk(w, rows, u, delta, z, dy, where, bias, skip, softplus_on, has_z)
                for n in range(d_state):
                    load_matrix(v[n], B_LANES, B_steps, B, B_constant, b, d, n, t0, length, channels)
                    load_matrix(v[n], C_LANES, C_steps, C, C_constant, b, d, n, t0, length, channels)
                    h[:width] = states[b, chunk, at, n]
                    _recompute(h, w, v, B_steps, length, packed, edges[0], edges[2], table, d, n, width)
                    _reverse(w, v, B_steps, C_steps, dB_task[n, here], dC_task[n, here],
                             backwards, length, packed, varlen, *edges,
                              dlast, dtable, d, n, width)  # fmt: skip
                _finish_chunk(w, rows, skip, where, z, has_z, du, ddelta, dz, y, dD_lanes, dbias_lanes)
            dD[b, at], dbias[b, at] = dD_lanes[:width], dbias_lanes[:width]
            for n in range(d_state):
                dA[b, at, n] = v[n, DA : DA + width]
                dB_constant[b, at, n] = v[n, DB : DB + width]
                dC_constant[b, at, n] = v[n, DC : DC + width]
                if not varlen:
                    dtable[b, at, n] = v[n, H : H + width]
