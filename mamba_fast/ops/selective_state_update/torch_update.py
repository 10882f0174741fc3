"""One step of the recurrence in plain PyTorch: any device, any float type."""

import torch
import torch.nn.functional as F


def update(state, x, dt, A, B, C, D, z, dt_bias, softplus, indices):
    """y like x; state (S, P, N) or (S, H, P, N) is updated in place."""
    if indices is None:
        y, h = step(state, x, dt, A, B, C, D, z, dt_bias, softplus)
        state.copy_(h)
        return y
    live = indices >= 0
    row = indices.clamp(min=0).long()
    y, h = step(state[row], x, dt, A, B, C, D, z, dt_bias, softplus)
    state[row[live]] = h[live].to(state.dtype)
    return y.masked_fill_(~live.reshape(-1, *[1] * (x.dim() - 1)), 0)


def step(state, x, dt, A, B, C, D, z, dt_bias, softplus):
    """(y in x's type, the next state in float32 or float64); nothing is changed, everything differentiable.

    About 6 B H P N operations and B H P N exponentials; each operation reads and writes whole arrays.
    """
    given = [t for t in (state, x, dt, A, B, C, D, z, dt_bias) if t is not None]
    compute = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    state_t, x_t, dt_t, A, B, C = (t.to(compute) for t in (state, x, dt, A, B, C))
    Delta = dt_t if dt_bias is None else dt_t + dt_bias.to(compute)
    Delta = F.softplus(Delta) if softplus else Delta
    B, C = (_of_every_head(v, state.dim() == 4, A) for v in (B, C))
    h = torch.exp(Delta[..., None] * A) * state_t + (Delta * x_t)[..., None] * B
    y = (h * C).sum(-1)
    if D is not None:
        y = y + x_t * D.to(compute)
    if z is not None:
        y = y * F.silu(z.to(compute))
    return y.to(x.dtype), h


def _of_every_head(v, has_heads, A):
    """B or C, (B, N) or (B, G, N), as (B, 1, N) or (B, H, 1, N): head h reads group h // (H / G)."""
    v = v[:, None] if v.dim() == 2 else v
    return v.repeat_interleave(A.shape[0] // v.shape[1], 1)[:, :, None] if has_heads else v
