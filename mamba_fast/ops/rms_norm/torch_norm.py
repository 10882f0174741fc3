"""Add and norm in plain PyTorch: any device, any float type, twice differentiable."""

import torch


def add_norm(x, weight, bias, residual, eps, sum_dtype, rms):
    """y (..., M) in x's type and the sum s = x + residual in `sum_dtype`; the norm reads s unrounded."""
    given = [t for t in (x, weight, bias, residual) if t is not None]
    compute = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    s = x.to(compute)
    if residual is not None:
        s = s + residual.to(compute)
    centred = s if rms else s - s.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype), s.to(sum_dtype)
