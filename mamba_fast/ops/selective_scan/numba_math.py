"""Arithmetic and memory of the numba kernels, laid out so that LLVM turns loops over channels into SIMD.

The inner loop always runs over LANES neighbouring channels: one instruction stream, no dependence
on each other. Two things would stop it from becoming SIMD. A library exp: hence the polynomial.
And arrays that might overlap: hence one array `w` (CHUNK, ROW) a task for everything that has a time
step, quantity Q of lane j at w[t, Q + j], and one array `v` (N, STATE) for what has a state n. The
distances within a row are constants, so nothing has to be checked at run time.
"""

from pathlib import Path

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

CHUNK = 64
LANES = 16

# Columns of w: Δ, u, Δu, dy before the gate, y, what reaches ddelta by the decay, Σ_n g B, A_bar, h_{t-1}
DELTA, U, DELTA_U, DY, Y, BY_DECAY, DBU, DECAY, H_PREV = (i * LANES for i in range(9))
ROW = 9 * LANES
# Columns of v: the running state or flow, A (or A log2 e), constant B and C, three gradients
H, A_N, B_LANES, C_LANES, DA, DB, DC = (i * LANES for i in range(7))
STATE = 7 * LANES

F = np.float32
LOG2E = F(1.4426950408889634)
# No reassociation and no assumption about NaN or infinity: only fused multiply-add.
EXACT = {"contract"}


def _drop_stale_kernels():
    """numba caches a kernel by its own file alone: forget those older than a file they inline."""
    folder = Path(__file__).parent
    newest = max(source.stat().st_mtime for source in folder.glob("numba_*.py"))
    for index in (folder / "__pycache__").glob("numba_*.nbi"):
        if index.stat().st_mtime < newest:
            index.unlink(missing_ok=True)


_drop_stale_kernels()


@intrinsic
def _float_from_bits(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@njit(fastmath=EXACT, cache=True)
def exp2(x):
    """2^x in float32 to 1.1 units in the last place: 2^x = 2^k 2^r, |r| <= 1/2, 2^r by a minimax polynomial.

    0 below x = -126.5, inf from x = 127.5 on; NaN stays NaN.
    """
    x = F(-127) if x < F(-127) else x
    x = F(128) if x > F(128) else x
    k = np.rint(x)
    r = x - k
    p = F(1.5594678e-4)
    p = p * r + F(1.3406643e-3)
    p = p * r + F(9.6176928e-3)
    p = p * r + F(5.5503104e-2)
    p = p * r + F(2.4022652e-1)
    p = p * r + F(6.9314724e-1)
    p = p * r + F(1)
    return p * _float_from_bits((np.int32(k) + np.int32(127)) << np.int32(23))


@njit(fastmath=EXACT, error_model="numpy", cache=True)  # no branch for a zero divisor
def softplus(x):
    """log(1 + e^x) = max(x, 0) + 2 atanh(s), s = w / (2 + w), w = e^-|x|; the identity above 20.

    s <= 1/3, so eight terms of atanh's series are exact to float32, also where e^x is far below 1.
    """
    w = exp2(-abs(x) * LOG2E)
    s = w / (F(2) + w)
    q = s * s
    p = F(1 / 15)
    p = p * q + F(1 / 13)
    p = p * q + F(1 / 11)
    p = p * q + F(1 / 9)
    p = p * q + F(1 / 7)
    p = p * q + F(1 / 5)
    p = p * q + F(1 / 3)
    p = p * q + F(1)
    return x if x > F(20) else (x if x > F(0) else F(0)) + F(2) * s * p


@njit(fastmath=EXACT, error_model="numpy", cache=True)  # no branch for a zero divisor
def sigmoid(x):
    return F(1) / (F(1) + exp2(-x * LOG2E))


@njit(cache=True)
def aligned(rows, columns):
    """Zeros (rows, columns) from a cache line's edge: a vector of 16 floats must not straddle two lines."""
    flat = np.zeros(rows * columns + LANES, np.float32)
    first = (-flat.ctypes.data % 64) // 4
    return flat[first : first + rows * columns].reshape(rows, columns)


@njit(fastmath=EXACT, cache=True)
def steps_of(x, where, j):
    """Channel j of a chunk of x (B, D, L), as (length,); where = (b, first channel, channels, t0, length)."""
    return x[where[0], where[1] + j][where[3] : where[3] + where[4]]


@njit(fastmath=EXACT, cache=True)
def load_tile(w, quantity, x, where):
    """A chunk of x (B, D, L) into w, transposed."""
    for j in range(where[2]):
        row = steps_of(x, where, j)
        for t in range(where[4]):
            w[t, quantity + j] = row[t]


@njit(fastmath=EXACT, cache=True)
def spread(w, quantity, rows, where):
    """rows (LANES, CHUNK) into w, transposed."""
    for j in range(where[2]):
        row = rows[j]
        for t in range(where[4]):
            w[t, quantity + j] = row[t]


@njit(fastmath=EXACT, cache=True)
def load_steps(w, rows, u, delta, where, bias, D, softplus_on):
    """u, Δ = softplus(delta + delta_bias), Δu, and y, which starts as D u."""
    length = where[4]
    for j in range(where[2]):
        raw, Delta = steps_of(delta, where, j), rows[j]
        if softplus_on:
            for t in range(length):
                Delta[t] = softplus(raw[t] + bias[j])
        else:
            for t in range(length):
                Delta[t] = raw[t] + bias[j]
    spread(w, DELTA, rows, where)
    load_tile(w, U, u, where)
    for t in range(length):
        x_t = w[t]
        for j in range(LANES):
            x_t[DELTA_U + j] = x_t[DELTA + j] * x_t[U + j]
            x_t[Y + j] = D[j] * x_t[U + j]


@njit(cache=True)
def load_matrix(v_n, lanes, steps, matrix, constant, b, d, n, t0, length, channels):
    """B or C of state n as steps[t] * v_n[lanes + j], for channels d, d + 1, ... of one group.

    matrix: (B, G, N, L), then the lanes are 1; or constant in time, (1, D, N, 1), then steps are 1.
    """
    if constant:
        steps[:length] = F(1)
        for j in range(LANES):
            v_n[lanes + j] = matrix[0, min(d + j, channels - 1), n, 0]
    else:
        group = d // (channels // matrix.shape[1])
        for j in range(LANES):
            v_n[lanes + j] = F(1)
        for t in range(length):
            steps[t] = matrix[b, group, n, t0 + t]
