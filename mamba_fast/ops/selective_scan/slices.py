"""What a slice of a sequence hands to its neighbours, and how what many slices hand on adds up.

Along the tokens it is the state after the slice, from zero; against them, for the backward, the flow
A_bar g at its start. Both are found without scanning: each token's share decays by a sum of Δ.
"""

import importlib

import torch
import torch.nn.functional as F

_STEPS = 64  # tokens whose shares (B, D, N, _STEPS) plain PyTorch holds at a time


def summary(x, delta, A, M, gate, delta_bias, reverse, backend):
    """(local (B, D, N), total (B, D)): what a slice hands on, and the sum of its Δ.

    Δ = softplus(delta + delta_bias). With x = u and M = B, local is the state after the slice, from zero:
    Σ_t exp(A Σ_{s>t} Δ_s) Δ_t x_t M_t. With reverse, x = dy, gate = z and M = C, it is the flow at its start:
    Σ_t exp(A Σ_{s<=t} Δ_s) x_t SiLU(gate_t) M_t.

    x, delta, gate (None: 1): (B, D, L). M: (B or 1, G, N, L or 1), as :class:`Arguments` has B and C.
    Reads x, delta, gate and M once; 4 B D L N operations.
    """
    if backend in ("triton", "cuda"):
        room = importlib.import_module(f"{__package__}.{backend}_slice")
        return room.summary(x, delta, A, M, gate, delta_bias, reverse)
    wide = torch.promote_types(x.dtype, torch.float32)
    Delta = F.softplus(delta.to(wide) + delta_bias.to(wide)[:, None])
    x = x.to(wide) if gate is None else x.to(wide) * F.silu(gate.to(wide))
    if reverse:
        passed = Delta.cumsum(-1)
    else:
        passed = F.pad(Delta[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
        x = x * Delta
    local = x.new_zeros(*x.shape[:2], A.shape[1])
    M = M.expand(*M.shape[:3], x.shape[2])
    for t in range(0, x.shape[2], _STEPS):
        part = slice(t, t + _STEPS)
        m = M[..., part].to(wide).repeat_interleave(x.shape[1] // M.shape[1], 1)  # (B or 1, D, N, steps)
        decay = torch.exp(A[..., None] * passed[:, :, None, part])
        local += (decay * x[:, :, None, part] * m).sum(-1)
    return local, Delta.sum(-1)


def chain(A, local, total, arrives=None):
    """(B, D, N): what arrives behind S slices, of local (S, B, D, N) and total (S, B, D), the farthest first.

    Σ_s exp(A Σ_{q>s} total_q) local_s, over those s for which arrives (S, B) holds.
    """
    nearer = torch.cat([total[1:], torch.zeros_like(total[:1])])
    nearer = nearer.flip(0).cumsum(0).flip(0)  # from its own end: a difference would lose digits
    shares = torch.exp(A * nearer[..., None]) * local
    if arrives is not None:
        shares = torch.where(arrives[..., None, None], shares, 0)
    return shares.sum(0)


def behind(A, local, total, reverse):
    """The summary of a slice from those of its pieces, local (B, S, D, N) and total (B, S, D)."""
    pieces = (v.transpose(0, 1) for v in (local, total))
    return chain(A, *((v.flip(0) for v in pieces) if reverse else pieces)), total.sum(1)
