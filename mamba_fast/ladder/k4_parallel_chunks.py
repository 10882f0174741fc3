"""k4: all chunks of the sequence at once. Seen from outside, a chunk is one step: h -> decay h + end.

Changed from k3: a tile is a program of its own. Pass 1 finds each chunk's decay exp(A sum(delta)) and its end
from h = 0, pass 2 runs h = decay h + end over the chunks, pass 3 is k3's tile. Registers, SRAM: as in k3.
HBM: u, delta, B twice; a decay and a state (N) per chunk come and go: (6 + 3 N / BLOCK_D) w + 32 N / BLOCK_L
bytes per (b, d, t). Still wrong: reads and exponentials twice, a waste where channels abound.
"""

import torch

from mamba_fast.ladder.common import prepare, tl, triton
from mamba_fast.ladder.k3_time_tiles import combine, load_step, store_gated

BLOCK_D, BLOCK_L, BLOCK_H, NUM_WARPS = 4, 128, 128, 2


@triton.jit
def chunk_kernel(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, decay_ptr, state_ptr,
                 d_inner, seqlen, d_state, OUTPUTS: tl.constexpr, SOFTPLUS: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr):  # fmt: skip
    pid_c, pid_d, pid_b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_d, offs_l = pid_d * BLOCK_D + tl.arange(0, BLOCK_D), pid_c * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_d, mask_l = offs_d < d_inner, offs_l < seqlen
    mask_dl = mask_d[:, None] & mask_l[None, :]
    offs_dl = (pid_b * d_inner + offs_d)[:, None] * seqlen + offs_l[None, :]
    offs_h = ((pid_b * tl.num_programs(0) + pid_c) * d_inner + offs_d) * d_state  # in (B, chunks, D, N)
    bias, D = tl.load(bias_ptr + offs_d, mask_d, 0.0), tl.load(D_ptr + offs_d, mask_d, 0.0)  # (D,)
    u, delta = load_step(u_ptr, delta_ptr, bias[:, None], offs_dl, mask_dl, SOFTPLUS)  # (D, L)
    after = tl.cumsum(delta, 1, reverse=True) - delta  # sum of the deltas still to come in this chunk
    y = D[:, None] * u
    for n in range(d_state):
        offs_nl = (pid_b * d_state + n) * seqlen + offs_l
        A = tl.load(A_ptr + offs_d * d_state + n, mask_d, 0.0)[:, None]  # (D, 1)
        B = tl.load(B_ptr + offs_nl, mask_l, 0.0).to(tl.float32)[None, :]  # (1, L)
        if OUTPUTS:
            C = tl.load(C_ptr + offs_nl, mask_l, 0.0).to(tl.float32)[None, :]
            h = tl.load(state_ptr + offs_h + n, mask_d, 0.0)[:, None]
            decay, from_zero = tl.associative_scan((tl.exp(delta * A), delta * u * B), 1, combine)  # (D, L)
            y += C * (decay * h + from_zero)
        else:
            tl.store(decay_ptr + offs_h + n, tl.exp(tl.sum(delta * A, 1)), mask_d)
            tl.store(state_ptr + offs_h + n, tl.sum(tl.exp(after * A) * delta * u * B, 1), mask_d)
    if OUTPUTS:
        store_gated(y, y_ptr, z_ptr, offs_dl, mask_dl)


@triton.jit
def carry_kernel(decay_ptr, state_ptr, h_ptr, chunks, size, BLOCK_H: tl.constexpr):
    offs, pid_b = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H), tl.program_id(1).to(tl.int64)
    mask = offs < size
    h = tl.load(h_ptr + pid_b * size + offs, mask, 0.0)
    for c in range(chunks):
        offs_c = (pid_b * chunks + c) * size + offs
        decay, end = tl.load(decay_ptr + offs_c, mask, 0.0), tl.load(state_ptr + offs_c, mask, 0.0)
        tl.store(state_ptr + offs_c, h, mask)  # the state that chunk c starts from
        h = decay * h + end
    tl.store(h_ptr + pid_b * size + offs, h, mask)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                   return_last_state=False, *, initial_state=None):  # fmt: skip
    """The function of k3 in three launches: every chunk as one step, the states between chunks, outputs."""
    *inputs, h = prepare(u, delta, A, B, C, D, z, delta_bias, initial_state)
    (batch, d_inner, seqlen), (size, d_state) = u.shape, (A.numel(), A.shape[1])
    chunks, blocks = triton.cdiv(seqlen, BLOCK_L), triton.cdiv(d_inner, BLOCK_D)
    y, (decay, state) = torch.empty_like(inputs[0]), torch.empty(2, batch, chunks, size, device=u.device)
    args = (*inputs, y, decay, state, d_inner, seqlen, d_state)
    tile = {"SOFTPLUS": delta_softplus, "BLOCK_D": BLOCK_D, "BLOCK_L": BLOCK_L, "num_warps": NUM_WARPS}
    chunk_kernel[chunks, blocks, batch](*args, OUTPUTS=False, **tile)
    carry_kernel[triton.cdiv(size, BLOCK_H), batch](decay, state, h, chunks, size, BLOCK_H=BLOCK_H)
    chunk_kernel[chunks, blocks, batch](*args, OUTPUTS=True, **tile)
    return (y, h) if return_last_state else y


def bytes_moved(batch, seqlen, d_inner, d_state, itemsize):
    """Bytes the programs read and write, every option on."""
    blocks, chunks = triton.cdiv(d_inner, BLOCK_D), triton.cdiv(seqlen, BLOCK_L)
    sequences = 6 * d_inner + 3 * d_state * blocks  # u, delta twice, z, y; B twice and C by every block
    once = 4 * d_inner * (chunks * (8 * d_state + 4) + 3 * d_state)  # A, decay, end, state, bias, D; h
    return batch * (seqlen * sequences * itemsize + once)
