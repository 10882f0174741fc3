"""Arithmetic and memory of the numba kernels, laid out so that LLVM turns loops over channels into SIMD.

The inner loop always runs over LANES neighbouring channels: one instruction stream, no dependence
on each other. Two things would stop it from becoming SIMD. A library exp: hence the polynomial.
And arrays that might overlap: hence one array `w` (CHUNK, ROW) a task for everything that has a time
step, quantity Q of lane j at w[t, Q + j], and one array `v` (N, STATE) for what has a state n. The
distances within a row are constants, so nothing has to be checked at run time.
"""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

CHUNK = 32
LANES = 16

# Columns of w: Δ, dΔ/d(delta), u, Δu, dy before the gate, y, z, dout, Σ_n of what reaches Δ by the decay, Σ_n g B, A_bar, h_{t-1}
DELTA, SLOPE, U, DELTA_U, DY, Y, Z, DOUT, BY_DECAY, DBU, DECAY, H_PREV = (i * LANES for i in range(12))
ROW = 12 * LANES
# Columns of v: the running state or flow, A (or A log2 e), B and C where they are constant in time, and three gradients
H, A_N, B_LANES, C_LANES, DA, DB, DC = (i * LANES for i in range(7))
STATE = 7 * LANES

F = np.float32
LOG2E = F(1.4426950408889634)
# No reassociation and no assumption about NaN or infinity: only fused multiply-add.
EXACT = {"contract"}


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


@njit(fastmath=EXACT, cache=True)
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


@njit(fastmath=EXACT, cache=True)
def sigmoid(x):
    return F(1) / (F(1) + exp2(-x * LOG2E))


@njit(fastmath=EXACT, cache=True)
def load_tile(w, quantity, rows):
    """rows (channels, steps) of a (D, L) tensor into w, transposed."""
    for t in range(rows.shape[1]):
        for j in range(rows.shape[0]):
            w[t, quantity + j] = rows[j, t]


@njit(fastmath=EXACT, cache=True)
def store_tile(rows, w, quantity):
    for t in range(rows.shape[1]):
        for j in range(rows.shape[0]):
            rows[j, t] = w[t, quantity + j]


@njit(fastmath=EXACT, cache=True)
def load_steps(w, u, delta, bias, D, softplus_on):
    """u, Δ = softplus(delta + delta_bias), Δu, and y, which starts as D u. SLOPE holds delta + delta_bias."""
    load_tile(w, U, u)
    load_tile(w, SLOPE, delta)
    for t in range(u.shape[1]):
        x_t = w[t]
        for j in range(LANES):
            x_t[SLOPE + j] += bias[j]
        if softplus_on:
            for j in range(LANES):
                x_t[DELTA + j] = softplus(x_t[SLOPE + j])
        else:
            for j in range(LANES):
                x_t[DELTA + j] = x_t[SLOPE + j]
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
