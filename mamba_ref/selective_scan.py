"""The selective scan as a loop over time: a NumPy float64 oracle and the same loop in PyTorch.

Paper: Algorithm 2, lines 3 to 6, with the discretization the published code uses
(A_bar = exp(delta A), B_bar = delta B; see :mod:`mamba_ref.discretize`).
"""

import numpy as np
import torch
import torch.nn.functional as F

from mamba_ref.packing import by_sequence


def selective_scan_numpy(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
    return_last_state=False, *, initial_state=None, seq_idx=None, cu_seqlens=None, return_states=False,
):  # fmt: skip
    """The oracle: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t, then y SiLU(z).

    u, delta, z: (B, D, L). A: (D, N), real or complex. B, C: (B, N, L), (B, G, N, L) or constant
    (D, N). D, delta_bias: (D,). initial_state: (B, D, N). Everything is computed in float64
    (complex128 when A is complex; variable B and C then hold interleaved re, im pairs: (..., 2L)).
    seq_idx (B, L) or cu_seqlens (S + 1,) mark packed sequences; see :mod:`mamba_ref.packing`.

    Returns y (B, D, L), then last_state (B, D, N) and every state (B, D, L, N) where asked for.
    Costs about 6 B D L N operations and, for the states, 8 B D L N bytes.
    """
    if seq_idx is not None or cu_seqlens is not None:
        return by_sequence(selective_scan_numpy, np, u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                           return_last_state, initial_state, seq_idx, cu_seqlens, return_states)  # fmt: skip
    u, delta = np.asarray(u, np.float64), np.asarray(delta, np.float64)
    batch, d_inner, seqlen = u.shape
    A = np.asarray(A, np.complex128 if np.iscomplexobj(A) else np.float64)
    B, C = (_per_channel_numpy(x, A.dtype, d_inner) for x in (B, C))  # (B or 1, D or 1, N, L or 1)
    if delta_bias is not None:
        delta = delta + np.asarray(delta_bias, np.float64)[:, None]
    if delta_softplus:
        delta = np.where(delta > 20, delta, np.log1p(np.exp(np.minimum(delta, 20))))
    h = np.zeros((batch, *A.shape), A.dtype) if initial_state is None else np.asarray(initial_state, A.dtype)
    y, states = np.empty_like(u), np.empty((batch, d_inner, seqlen, A.shape[1]), A.dtype)
    for t in range(seqlen):
        B_t, C_t = (x[..., t if x.shape[-1] > 1 else 0] for x in (B, C))  # (B or 1, D or 1, N)
        A_bar = np.exp(delta[:, :, t, None] * A)  # (B, D, N)
        h = A_bar * h + (delta[:, :, t] * u[:, :, t])[..., None] * B_t
        y[:, :, t] = (C_t * h).sum(-1).real * (2 if np.iscomplexobj(A) else 1)
        states[:, :, t] = h
    if D is not None:
        y = y + np.asarray(D, np.float64)[:, None] * u
    if z is not None:
        y = y * (np.asarray(z, np.float64) / (1 + np.exp(-np.asarray(z, np.float64))))
    out = (y, *([h] if return_last_state else []), *([states] if return_states else []))
    return out if len(out) > 1 else y


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
    return_last_state=False, *, initial_state=None, seq_idx=None, cu_seqlens=None,
):  # fmt: skip
    """The same loop in PyTorch: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t.

    Shapes as in :func:`selective_scan_numpy`. u, delta, z and variable B, C: one floating type;
    half types are read as float32 and y is rounded to u's type once, at the end. A, D and
    delta_bias: float32 (float64 beside float64 inputs). Differentiable in every argument.

    Returns y (B, D, L), or (y, last_state (B, D, N)). Costs about 6 B D L N operations in 8 L
    launches; autograd keeps 2 to 3 tensors of (B, D, L, N).
    """
    if seq_idx is not None or cu_seqlens is not None:
        return by_sequence(selective_scan, torch, u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                           return_last_state, initial_state, seq_idx, cu_seqlens)  # fmt: skip
    dtype_in, compute = u.dtype, torch.promote_types(u.dtype, torch.float32)
    u, delta = u.to(compute), delta.to(compute)
    batch, d_inner, seqlen = u.shape
    state_type = compute.to_complex() if A.is_complex() else compute
    A = A.to(state_type)
    B, C = (_per_channel_torch(x, state_type, d_inner) for x in (B, C))  # (B or 1, D or 1, N, L or 1)
    if delta_bias is not None:
        delta = delta + delta_bias.to(compute)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h = A.new_zeros(batch, *A.shape) if initial_state is None else initial_state.to(state_type)
    ys = []
    for u_t, delta_t, B_t, C_t in zip(*(_steps(x, seqlen) for x in (u, delta, B, C)), strict=True):
        A_bar = torch.exp(delta_t[..., None] * A)  # (B, D, N)
        h = A_bar * h + (delta_t * u_t)[..., None] * B_t
        y_t = (C_t * h).sum(-1)
        ys.append(2 * y_t.real if A.is_complex() else y_t)
    y = torch.stack(ys, dim=-1) if ys else torch.zeros_like(u)
    if D is not None:
        y = y + D.to(compute)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(compute))
    return (y.to(dtype_in), h) if return_last_state else y.to(dtype_in)


def _steps(x, seqlen):
    """x (..., L or 1) as L time steps. Indexing x[..., t] instead would cost L^2 in the backward."""
    return x.unbind(-1) if x.shape[-1] == seqlen else (x[..., 0],) * seqlen


def _per_channel_numpy(x, dtype, d_inner):
    """B or C in any accepted form as (B or 1, D or 1, N, L or 1): group g serves D / G channels."""
    x = np.asarray(x)
    if x.ndim == 2:
        return x.astype(dtype)[None, :, :, None]
    if np.issubdtype(dtype, np.complexfloating):
        x = x[..., 0::2] + 1j * x[..., 1::2]
    x = x[:, None] if x.ndim == 3 else x
    return x.astype(dtype) if x.shape[1] == 1 else np.repeat(x.astype(dtype), d_inner // x.shape[1], axis=1)


def _per_channel_torch(x, dtype, d_inner):
    """B or C in any accepted form as (B or 1, D or 1, N, L or 1): group g serves D / G channels."""
    if x.dim() == 2:
        return x.to(dtype)[None, :, :, None]
    if dtype.is_complex:
        x = torch.view_as_complex(x.to(dtype.to_real()).unflatten(-1, (-1, 2)).contiguous())
    x = x[:, None] if x.dim() == 3 else x
    return x.to(dtype) if x.shape[1] == 1 else x.to(dtype).repeat_interleave(d_inner // x.shape[1], dim=1)
