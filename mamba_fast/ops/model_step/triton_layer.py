"""The kernels of a layer for many sequences. Tiles: BLOCK_M sequences by BLOCK_D channels.

E = d_model, D = d_inner, R = dt_rank. PARTS: a product is a sum of so many, each over its share of the
columns, and whoever reads it adds them up.
"""

import triton
import triton.language as tl

from mamba_fast.ops.selective_scan.triton_tiles import sigmoid, softplus
from mamba_fast.ops.triton_chain import add_parts, ask_for, meet

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def norm_kernel(
    tokens_ptr, embedding_ptr, parts_ptr, residual_ptr, weight_ptr, out_ptr, batch, eps,
    E: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """residual += what out_proj gave (before the first layer: = the embedding), out = RMSNorm(residual)."""
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_E)
    mask, at = e < E, row * E + e
    if PARTS > 0:
        weight = tl.load(weight_ptr + e, mask=mask, other=0.0).to(tl.float32)
    meet(PDL)
    if PARTS == 0:  # what comes before a step may be anything, also a change of weights
        weight = tl.load(weight_ptr + e, mask=mask, other=0.0).to(tl.float32)
    if PARTS == 0:
        token = tl.load(tokens_ptr + row)
        residual = tl.load(embedding_ptr + token * E + e, mask=mask, other=0.0).to(tl.float32)
    else:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        residual += add_parts(parts_ptr + at, mask, tl.cast(batch, tl.int64) * E, PARTS)
    tl.store(residual_ptr + at, residual, mask=mask)
    scale = tl.rsqrt(tl.sum(residual * residual, 0) / E + eps)
    tl.store(out_ptr + at, (residual * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def product_kernel(
    v_ptr, weight_ptr, parts_ptr, batch,
    K: tl.constexpr, ROWS: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """parts (PARTS, B, ROWS): W v over SHARE of the K columns of W (ROWS, K) each; v is (B, K).

    AHEAD: bytes of each row of W that are asked for before v is there.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    k = part * SHARE + tl.arange(0, BLOCK_K)
    rows = weight_ptr + tl.minimum(n, ROWS - 1).to(tl.int64) * K
    ask_for(rows + part * SHARE, AHEAD, WARPS, PDL)
    meet(PDL)
    mask_m = (m < batch)[:, None]
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        inside = start + k < K
        v = tl.load(v_ptr + m[:, None] * K + (start + k)[None, :], mask=mask_m & inside[None, :], other=0.0)
        weight = tl.load(rows[None, :] + (start + k)[:, None], mask=inside[:, None], other=0.0)
        out = tl.dot(v, weight, out)
    at = (part * batch + m)[:, None] * ROWS + n[None, :]
    tl.store(parts_ptr + at, out, mask=mask_m & (n < ROWS)[None, :])


@triton.jit
def recur_kernel(
    ranks_ptr, weight_ptr, bias_ptr, A_log_ptr, D_ptr, u_ptr, xz_ptr, state_ptr, y_ptr, batch,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, RANKS: tl.constexpr, XZ: tl.constexpr,
    PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Δ = softplus(W_Δ dt + b), h = exp(Δ A) h + Δ B u in place, y = (C h + D u) SiLU(z).

    RANKS, XZ: the parts of x_proj's product (dt, B, C) and of in_proj's (x, z).
    """
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    mask_m, mask_d, mask_n = (m < batch)[:, None], d < D, (n < N)[None, :]
    mask, at = mask_m & mask_d[None, :], m[:, None] * D + d[None, :]
    state_at, mask_state = state_ptr + at[:, :, None] * N + n[None, None, :], mask[:, :, None] & mask_n[None]
    state = tl.load(state_at, mask=mask_state, other=0.0)
    A_log = tl.load(A_log_ptr + d[:, None] * N + n[None, :], mask=mask_d[:, None] & mask_n, other=0.0)
    A = -LOG2E * tl.exp2(A_log * LOG2E)
    bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    skip = tl.load(D_ptr + d, mask=mask_d, other=0.0)
    meet(PDL)
    COLUMNS: tl.constexpr = R + 2 * N
    ranks, apart = ranks_ptr + m[:, None] * COLUMNS, tl.cast(batch, tl.int64) * COLUMNS
    B = add_parts(ranks + R + n[None, :], mask_m & mask_n, apart, RANKS)
    C = add_parts(ranks + R + N + n[None, :], mask_m & mask_n, apart, RANKS)
    u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z_at = xz_ptr + D + m[:, None] * (2 * D) + d[None, :]
    z = add_parts(z_at, mask, tl.cast(batch, tl.int64) * (2 * D), XZ)
    Delta = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, R, BLOCK_R):
        inside = start + r < R
        dt = add_parts(ranks + (start + r)[None, :], mask_m & inside[None, :], apart, RANKS)
        weight_at = weight_ptr + d[None, :] * R + (start + r)[:, None]
        weight = tl.load(weight_at, mask=mask_d[None, :] & inside[:, None], other=0.0)
        Delta = tl.dot(dt.to(weight.dtype), weight, Delta)
    Delta = softplus(Delta + bias[None, :])
    decay = tl.exp2(Delta[:, :, None] * A[None, :, :])
    state = decay * state.to(tl.float32) + (Delta * u)[:, :, None] * B[:, None, :]
    tl.store(state_at, state.to(state_ptr.dtype.element_ty), mask=mask_state)
    y = (tl.sum(state * C[:, None, :], 2) + u * skip[None, :]) * (z * sigmoid(z))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
