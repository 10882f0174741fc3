"""k1: the state never leaves the registers. One program carries one channel from the first step to the last.

Changed from the torch loop: one launch instead of several per time step, and h is not stored on the way.
Registers: h and a row of A (N). SRAM: nothing. HBM: u, delta, B, C read, y written.
Bytes per (b, d, t) at w = 4 bytes a number: (2 N + 3) w in the kernel, 14 w in the torch passes around it.
Still wrong: every channel reads all of B and C again, and every torch pass reads and writes (B, D, L).
"""

import torch
import torch.nn.functional as F

from mamba_fast.ladder.common import prepare, tl, triton

NUM_WARPS = 1


@triton.jit
def scan_kernel(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, h_ptr, y_ptr, d_inner, seqlen, d_state,
                BLOCK_N: tl.constexpr):  # fmt: skip
    pid_d, pid_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < d_state
    offs_h = (pid_b * d_inner + pid_d) * d_state + offs_n
    offs_dl, offs_nl = (pid_b * d_inner + pid_d) * seqlen, (pid_b * d_state + offs_n) * seqlen
    A = tl.load(A_ptr + pid_d * d_state + offs_n, mask_n, 0.0)  # (N,)
    h = tl.load(h_ptr + offs_h, mask_n, 0.0)  # (N,)
    for t in range(seqlen):
        u = tl.load(u_ptr + offs_dl + t).to(tl.float32)
        delta = tl.load(delta_ptr + offs_dl + t)
        B = tl.load(B_ptr + offs_nl + t, mask_n, 0.0).to(tl.float32)  # (N,)
        C = tl.load(C_ptr + offs_nl + t, mask_n, 0.0).to(tl.float32)
        h = tl.exp(delta * A) * h + delta * u * B
        tl.store(y_ptr + offs_dl + t, tl.sum(C * h, 0))
    tl.store(h_ptr + offs_h, h, mask_n)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                   return_last_state=False, *, initial_state=None):  # fmt: skip
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t; bias, softplus, D and z by torch."""
    u, delta, A, B, C, D, z, delta_bias, h = prepare(u, delta, A, B, C, D, z, delta_bias, initial_state)
    (batch, d_inner, seqlen), d_state = u.shape, A.shape[1]
    delta = delta.float() + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    y = torch.empty_like(delta)  # float32 until the end
    scan_kernel[(d_inner, batch)](
        u, delta, A, B, C, h, y, d_inner, seqlen, d_state,
        BLOCK_N=triton.next_power_of_2(d_state), num_warps=NUM_WARPS,
    )  # fmt: skip
    y = y + D[:, None] * u.float()
    if z is not None:
        y = y * F.silu(z.float())
    return (y.to(u.dtype), h) if return_last_state else y.to(u.dtype)


def bytes_moved(batch, seqlen, d_inner, d_state, itemsize):
    """Bytes the kernel and the torch passes around it read and write, every option on."""
    kernel = (2 * d_state + 1) * itemsize + 4 + 4  # B, C and u; delta and y are float32 here
    passes = 4 * (2 + 2 + 2 + 3 + 2 + 3)  # + bias, softplus, D u, + y, SiLU(z), times y
    convert = 4 * (itemsize + 4) if itemsize < 4 else 0  # delta, u, z to float32, y back
    once = 4 * d_inner * (4 * d_state * batch + 2)  # A by every program; h zeroed, read, written; bias, D
    return batch * d_inner * seqlen * (kernel + passes + convert) + once
