"""k3: a tile of time steps at once. Steps combine associatively, so a tile takes log2(BLOCK_L) rounds.

Changed from k2: the loop goes from tile to tile, and only the state at a tile's edge is handed on; loads run
along time, where memory is contiguous. Registers: u, delta, y and one state n of the tile (BLOCK_D, BLOCK_L),
and h (BLOCK_D, N). SRAM: what the scan's warps tell each other. HBM: as in k2, but A again for every tile.
Bytes per (b, d, t): (4 + 2 N / BLOCK_D) w + 4 N / BLOCK_L. Still wrong: few channels make few programs.
"""

import torch

from mamba_fast.ladder.common import prepare, tl, triton
from mamba_fast.ladder.k2_read_once import load_step, store_gated

BLOCK_D, BLOCK_L, NUM_WARPS = 4, 256, 4


@triton.jit
def combine(decay_1, h_1, decay_2, h_2):
    """First segment 1, then segment 2: h -> decay_2 (decay_1 h + h_1) + h_2."""
    return decay_2 * decay_1, decay_2 * h_1 + h_2


@triton.jit
def scan_kernel(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h_ptr, y_ptr, d_inner, seqlen,
                d_state, SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_L: tl.constexpr):  # fmt: skip
    pid_d, pid_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_d, offs_n = pid_d * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    mask_d = offs_d < d_inner
    mask_dn = mask_d[:, None] & (offs_n < d_state)[None, :]
    offs_h = (pid_b * d_inner + offs_d)[:, None] * d_state + offs_n[None, :]
    bias, D = tl.load(bias_ptr + offs_d, mask_d, 0.0), tl.load(D_ptr + offs_d, mask_d, 0.0)  # (D,)
    h = tl.load(h_ptr + offs_h, mask_dn, 0.0)  # (D, N)
    for start in range(0, seqlen, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        mask_l = offs_l < seqlen
        mask_dl = mask_d[:, None] & mask_l[None, :]
        offs_dl = (pid_b * d_inner + offs_d)[:, None] * seqlen + offs_l[None, :]
        u, delta = load_step(u_ptr, delta_ptr, bias[:, None], offs_dl, mask_dl, SOFTPLUS)  # (D, L)
        y = D[:, None] * u
        for n in range(d_state):
            offs_nl = (pid_b * d_state + n) * seqlen + offs_l
            A = tl.load(A_ptr + offs_d * d_state + n, mask_d, 0.0)[:, None]  # (D, 1)
            B = tl.load(B_ptr + offs_nl, mask_l, 0.0).to(tl.float32)[None, :]  # (1, L)
            C = tl.load(C_ptr + offs_nl, mask_l, 0.0).to(tl.float32)[None, :]
            decay, from_zero = tl.associative_scan((tl.exp(delta * A), delta * u * B), 1, combine)  # (D, L)
            h_n = tl.sum(tl.where(offs_n[None, :] == n, h, 0.0), 1)  # column n of h
            states = decay * h_n[:, None] + from_zero
            y += C * states
            h_n = tl.sum(tl.where(offs_l[None, :] == start + BLOCK_L - 1, states, 0.0), 1)  # the last step
            h = tl.where(offs_n[None, :] == n, h_n[:, None], h)
        store_gated(y, y_ptr, z_ptr, offs_dl, mask_dl)
    tl.store(h_ptr + offs_h, h, mask_dn)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                   return_last_state=False, *, initial_state=None):  # fmt: skip
    """The function of k2, BLOCK_L steps at a time: h_t = decay_t h + (state of the tile from zero)_t."""
    inputs = prepare(u, delta, A, B, C, D, z, delta_bias, initial_state)
    (batch, d_inner, seqlen), d_state = u.shape, A.shape[1]
    y = torch.empty_like(inputs[0])
    scan_kernel[(triton.cdiv(d_inner, BLOCK_D), batch)](
        *inputs, y, d_inner, seqlen, d_state, SOFTPLUS=delta_softplus, BLOCK_D=BLOCK_D,
        BLOCK_N=triton.next_power_of_2(d_state), BLOCK_L=BLOCK_L, num_warps=NUM_WARPS,
    )  # fmt: skip
    return (y, inputs[-1]) if return_last_state else y


def bytes_moved(batch, seqlen, d_inner, d_state, itemsize):
    """Bytes the programs read and write, every option on."""
    blocks, tiles = triton.cdiv(d_inner, BLOCK_D), triton.cdiv(seqlen, BLOCK_L)
    sequences = 4 * d_inner + 2 * d_state * blocks  # u, delta, z, y; B and C by every block
    once = 4 * batch * d_inner * (d_state * (tiles + 3) + 2)  # A by every tile; h as before; bias, D
    return batch * seqlen * sequences * itemsize + once
