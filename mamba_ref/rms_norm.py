"""RMSNorm, alone and behind the residual sum: what stands in front of every block.

The residual stream is a sum of many small terms, so it is kept in float32 whatever the type of the
layers; each layer reads it through a norm (Add, then Norm, then Mixer).
"""

import numpy as np
import torch
from torch import nn

EPS = 1e-5  # the published value, everywhere


def rms_norm_numpy(x, weight, eps=EPS):
    """The oracle, in float64: y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last axis.

    x: (..., M). weight: (M,). Returns y (..., M). Raises ValueError for a wrong weight. Costs about 4
    operations an element; with float64 in and out, 16 bytes.
    """
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    _validate(x, weight)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rms_norm(x, weight, eps=EPS):
    """The same in PyTorch: y = x / sqrt(mean(x^2) + eps) * weight, computed in float32, in x's type.

    Shapes and errors as in :func:`rms_norm_numpy`. A float64 x is computed in float64.
    """
    _validate(x, weight)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm(x, residual, weight, eps=EPS):
    """Add, then norm: r = x + residual in float32, y = rms_norm(r) in x's type. Returns y and r.

    x: (..., M), what the last layer gave. residual: the same shape, or None before the first layer.
    y feeds the next layer, r is the residual after it. Errors as in :func:`rms_norm_numpy`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    residual = wide if residual is None else wide + residual
    return rms_norm(residual, weight, eps).to(x.dtype), residual


class RMSNorm(nn.Module):
    """:func:`rms_norm` with its weight (M,), which starts at one; with a residual, :func:`add_rms_norm`."""

    def __init__(self, d_model):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x, residual):
        return add_rms_norm(x, residual, self.weight)


def _validate(x, weight):
    if tuple(weight.shape) != tuple(x.shape[-1:]):
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}; accepted: {tuple(x.shape[-1:])}, x's last axis"
        )
