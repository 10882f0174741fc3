"""Arithmetic shared by the numba kernels, written so that LLVM turns every loop over channels into SIMD.

Work is laid out as tiles (CHUNK, LANES): CHUNK time steps of LANES neighbouring channels. The inner
loop always runs over the LANES channels, which have one instruction stream and no dependence on
each other. A library exp would stop that loop from becoming SIMD; the polynomial below does not.
"""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

CHUNK = 64
LANES = 16

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
    """2^x in float32 to 1 unit in the last place: 2^x = 2^k 2^r, |r| <= 1/2, 2^r by its Taylor terms.

    0 below x = -126.5, inf from x = 127.5 on; NaN stays NaN.
    """
    x = F(-127) if x < F(-127) else x
    x = F(128) if x > F(128) else x
    k = np.rint(x)
    r = x - k
    p = F(1.5403530e-4)  # ln(2)^n / n!, n = 6 ... 1
    p = p * r + F(1.3333558e-3)
    p = p * r + F(9.6181291e-3)
    p = p * r + F(5.5504109e-2)
    p = p * r + F(2.4022651e-1)
    p = p * r + F(6.9314718e-1)
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
def load_tile(tile, rows):
    """rows (channels, steps) of a (D, L) tensor into tile (CHUNK, LANES), transposed."""
    for t in range(rows.shape[1]):
        for j in range(rows.shape[0]):
            tile[t, j] = rows[j, t]


@njit(fastmath=EXACT, cache=True)
def store_tile(rows, tile):
    for t in range(rows.shape[1]):
        for j in range(rows.shape[0]):
            rows[j, t] = tile[t, j]


@njit(fastmath=EXACT, cache=True)
def load_delta(tile, slope, rows, bias, softplus_on):
    """Δ = softplus(delta + delta_bias) into tile, and dΔ/d(delta + delta_bias) into slope."""
    load_tile(tile, rows)
    for t in range(rows.shape[1]):
        for j in range(LANES):
            x = tile[t, j] + bias[j]
            if softplus_on:
                tile[t, j] = softplus(x)
                slope[t, j] = F(1) if x > F(20) else sigmoid(x)
            else:
                tile[t, j] = x
                slope[t, j] = F(1)


@njit(cache=True)
def load_matrix(lanes, steps, v, constant, b, d, n, t0, length, channels):
    """B or C of state n as steps[t] * lanes[j], for channels d, d + 1, ... of one group.

    v: (B, G, N, L), then lanes are 1; or constant in time, (1, D, N, 1), then steps are 1.
    """
    if constant:
        steps[:length] = F(1)
        for j in range(LANES):
            lanes[j] = v[0, min(d + j, channels - 1), n, 0]
    else:
        lanes[:] = F(1)
        group = d // (channels // v.shape[1])
        for t in range(length):
            steps[t] = v[b, group, n, t0 + t]
