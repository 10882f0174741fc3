"""k2: read every number once. One program carries a block of channels and does all their arithmetic.

Changed from k1: bias, softplus, D and the gate happen here, while their numbers are in registers anyway, and
BLOCK_D channels share each B_t and C_t. Registers: h and A (BLOCK_D, N). SRAM: nothing that lasts a step.
HBM: u, delta, z, B, C read, y written. Bytes per (b, d, t): (4 + 2 N / BLOCK_D) w.
Still wrong: neighbours in one load lie seqlen numbers apart, and step t + 1 waits for step t.
"""

import torch

from mamba_fast.ladder.common import prepare, softplus, tl, triton

BLOCK_D, NUM_WARPS = 8, 1


@triton.jit
def load_step(u_ptr, delta_ptr, bias, offs, mask, SOFTPLUS: tl.constexpr):
    """u and the finished delta; outside the mask both are 0: decay 1 and input 0, so that h stands still."""
    u = tl.load(u_ptr + offs, mask, 0.0).to(tl.float32)
    delta = tl.load(delta_ptr + offs, mask, 0.0).to(tl.float32) + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return u, tl.where(mask, delta, 0.0)


@triton.jit
def store_gated(y, y_ptr, z_ptr, offs, mask):
    if z_ptr is not None:
        z = tl.load(z_ptr + offs, mask, 0.0).to(tl.float32)
        y *= z / (1.0 + tl.exp(-z))
    tl.store(y_ptr + offs, y, mask)


@triton.jit
def scan_kernel(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h_ptr, y_ptr, d_inner, seqlen,
                d_state, SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    pid_d, pid_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_d, offs_n = pid_d * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    mask_d, mask_n = offs_d < d_inner, offs_n < d_state
    mask_dn = mask_d[:, None] & mask_n[None, :]
    offs_h = (pid_b * d_inner + offs_d)[:, None] * d_state + offs_n[None, :]
    offs_dl, offs_nl = (pid_b * d_inner + offs_d) * seqlen, (pid_b * d_state + offs_n) * seqlen
    A = tl.load(A_ptr + offs_d[:, None] * d_state + offs_n[None, :], mask_dn, 0.0)  # (D, N)
    bias, D = tl.load(bias_ptr + offs_d, mask_d, 0.0), tl.load(D_ptr + offs_d, mask_d, 0.0)  # (D,)
    h = tl.load(h_ptr + offs_h, mask_dn, 0.0)  # (D, N)
    for t in range(seqlen):
        u, delta = load_step(u_ptr, delta_ptr, bias, offs_dl + t, mask_d, SOFTPLUS)  # (D,)
        B = tl.load(B_ptr + offs_nl + t, mask_n, 0.0).to(tl.float32)  # (N,)
        C = tl.load(C_ptr + offs_nl + t, mask_n, 0.0).to(tl.float32)
        h = tl.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B[None, :]
        y = tl.sum(h * C[None, :], 1) + D * u
        store_gated(y, y_ptr, z_ptr, offs_dl + t, mask_d)
    tl.store(h_ptr + offs_h, h, mask_dn)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                   return_last_state=False, *, initial_state=None):  # fmt: skip
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t, then y SiLU(z), one kernel."""
    inputs = prepare(u, delta, A, B, C, D, z, delta_bias, initial_state)
    (batch, d_inner, seqlen), d_state = u.shape, A.shape[1]
    y = torch.empty_like(inputs[0])
    scan_kernel[(triton.cdiv(d_inner, BLOCK_D), batch)](
        *inputs, y, d_inner, seqlen, d_state, SOFTPLUS=delta_softplus,
        BLOCK_D=BLOCK_D, BLOCK_N=triton.next_power_of_2(d_state), num_warps=NUM_WARPS,
    )  # fmt: skip
    return (y, inputs[-1]) if return_last_state else y


def bytes_moved(batch, seqlen, d_inner, d_state, itemsize):
    """Bytes the programs read and write, every option on."""
    blocks = triton.cdiv(d_inner, BLOCK_D)
    sequences = 4 * d_inner + 2 * d_state * blocks  # u, delta, z, y; B and C by every block
    once = 4 * batch * d_inner * (4 * d_state + 2)  # A; h zeroed, read, written; bias, D
    return batch * seqlen * sequences * itemsize + once
