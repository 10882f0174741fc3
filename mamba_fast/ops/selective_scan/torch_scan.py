"""The selective scan in vectorised PyTorch: any device, any float type, complex A, twice differentiable.

The states of all time steps are materialised, (L, B, D, N), and found in about 2 sqrt(L) vector
steps instead of L: the sequence is cut into chunks of sqrt(L) steps, every chunk is scanned from
zero at the same time, the chunk end states are chained, and each chunk then adds what it inherits.
"""

import torch
import torch.nn.functional as F


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + x_t along dim 0, and h_t = x_t where reset_t.

    The adjoint is the same recurrence backwards in time, g_t = dh_t + conj(a_{t+1}) g_{t+1}, so the
    backward calls the forward and can itself be differentiated.
    """

    @staticmethod
    def forward(ctx, a, x, reset):
        h = _chunked(a, x, reset)
        ctx.save_for_backward(a, h, reset)
        return h

    @staticmethod
    def backward(ctx, dh):
        a, h, reset = ctx.saved_tensors
        a_next = torch.cat([a[1:], torch.zeros_like(a[:1])]).conj()
        stop = torch.cat([reset[1:], torch.ones_like(reset[:1])])  # nothing flows back over a reset
        g = _Recurrence.apply(a_next.flip(0), dh.flip(0), stop.flip(0)).flip(0)
        h_prev = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        da = torch.where(reset, torch.zeros((), dtype=g.dtype, device=g.device), g * h_prev.conj())
        return da, g, None


def _chunked(a, x, reset):
    """The recurrence over dim 0 of a, x (L, B, D, N) and reset (L, B, 1, 1), in 2 sqrt(L) steps."""
    seqlen = a.shape[0]
    if seqlen == 0:
        return x.clone()
    width = 1
    while width * width < seqlen:  # not math.isqrt: torch.compile cannot ask it about a length left open
        width += 1
    padding = (0, 0) * (a.dim() - 1) + (0, -seqlen % width)
    a, x, reset = (F.pad(v, padding).unflatten(0, (-1, width)) for v in (a, x, reset))
    h, decay, seen = x.clone(), a.clone(), reset.clone()  # (chunks, width, B, D, N)
    zero = h.new_zeros(())
    for q in range(width):
        if q > 0:
            h[:, q] += torch.where(reset[:, q], zero, a[:, q] * h[:, q - 1])
            decay[:, q] *= decay[:, q - 1]
            seen[:, q] |= seen[:, q - 1]
    for c in range(1, h.shape[0]):
        h[c] += torch.where(seen[c], zero, decay[c] * h[c - 1, -1])
    return h.flatten(0, 1)[:seqlen]


def selective_scan_torch(u, delta, A, B, C, D, z, delta_bias, initial_state, seq, softplus, varlen, rows):
    """(out, last_state) by plain PyTorch operations; arguments as normalised by the public function.

    B, C: (B or 1, G, N, L or 1). seq: (B, L) or None. Costs about 10 B D L N operations and keeps
    3 tensors of B D L N elements for the backward.
    """
    compute = torch.promote_types(u.dtype, torch.float32)
    state_type = compute.to_complex() if A.is_complex() else compute
    A, B, C = A.to(state_type), _time_first(B, u, state_type), _time_first(C, u, state_type)
    u_t, delta_t = (v.to(compute).permute(2, 0, 1) for v in (u, delta))  # (L, B, D)
    if delta_bias is not None:
        delta_t = delta_t + delta_bias.to(compute)
    if softplus:
        delta_t = F.softplus(delta_t)
    a = torch.exp(delta_t[..., None] * A)  # (L, B, D, N)
    x = (_grouped((delta_t * u_t).to(state_type), B) * B).flatten(2, 3).expand_as(a)
    reset, starts, ends = boundaries(u, seq, varlen)
    first = A.new_zeros(rows, *A.shape) if initial_state is None else initial_state.to(state_type)
    t, b, row = starts
    x = x.index_put((t, b), a[t, b] * first[row], accumulate=True)  # also 0: a NaN in A reaches token 0
    h = _Recurrence.apply(a, x, reset)
    y = (_grouped(h, C, states=True) * C).flatten(2, 3).sum(-1)
    y = 2 * y.real if A.is_complex() else y
    if D is not None:
        y = y + u_t * D.to(compute)
    if z is not None:
        y = y * F.silu(z.to(compute).permute(2, 0, 1))
    t, b, row = ends
    y = y.permute(1, 2, 0).to(u.dtype)
    return y.contiguous() if delta.is_contiguous() else y, first.index_put((row,), h[t, b])


def boundaries(u, seq, varlen):
    """Where states are reset, where they start from the table of initial states, where they end.

    Returns reset (L, B or 1, 1, 1) and, for starts and ends, index vectors (t, b, row of the table).
    """
    batch, seqlen = u.shape[0], u.shape[2]
    if seq is None:  # one sequence a row
        row = torch.arange(batch, device=u.device)
        reset = torch.zeros(seqlen, 1, 1, 1, dtype=torch.bool, device=u.device)
        ends = (row[: batch if seqlen else 0],) * 2
        zero = torch.zeros_like(ends[0])
        return reset, (zero, *ends), (zero + (seqlen - 1), *ends)
    change = torch.zeros(seqlen, batch, dtype=torch.bool, device=u.device)
    change[1:] = (seq[:, 1:] != seq[:, :-1]).T
    first, last = change.clone(), change.roll(-1, 0)
    first[:1], last[-1:] = True, True
    if not varlen:
        first[1:], last[:-1] = False, False

    def index(mask):
        t, b = mask.nonzero(as_tuple=True)
        return t, b, seq[b, t].long() if varlen else b

    return change[..., None, None], index(first), index(last)


def _time_first(v, u, dtype):
    """B or C (B or 1, G, N, L or 1) as (L or 1, B or 1, G, 1, N), complex pairs joined."""
    if dtype.is_complex and not v.is_complex() and v.shape[-1] != 1:
        v = torch.view_as_complex(v.to(dtype.to_real()).unflatten(-1, (-1, 2)).contiguous())
    return v.to(dtype).permute(3, 0, 1, 2).unsqueeze(3)


def _grouped(v, B, states=False):
    """Split the channels of v, (L, B, D) or (L, B, D, N), into (G, D / G) to meet B's groups."""
    v = v if states else v[..., None]
    groups = B.shape[2]
    return v.unflatten(2, (groups, v.shape[2] // groups if groups else 1))
