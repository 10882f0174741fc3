"""What the rooms share: the arguments by name, and the small steps between the large ones."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """The tensors of a call, in the order of the published signature.

    After the checks: conv_weight is (D, W); B and C, if given, have four axes; xz and the three projections
    have one type.
    """

    xz: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    delta_proj: Tensor
    out_proj: Tensor
    out_bias: Tensor | None
    A: Tensor
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    delta_bias: Tensor | None
    B_bias: Tensor | None
    C_bias: Tensor | None
    B_rms: Tensor | None
    C_rms: Tensor | None
    delta_rms: Tensor | None


class Settings(NamedTuple):
    """Everything else: which rooms run the convolution and the scan among it."""

    softplus: bool
    level: int
    eps: float
    conv: str
    scan: str


def as_matrix(v):
    """(B, F, L) as (F, B L), one column a token: a view if v has the strides of :func:`as_batch`."""
    return v.transpose(0, 1).flatten(1)


def as_batch(matrix, batch):
    """(F, B L) as (B, F, L) with strides (L, B L, 1): a view."""
    return matrix.view(len(matrix), batch, matrix.shape[1] // batch).transpose(0, 1)


def split_rows(t, x_dbl):
    """The rows of x_dbl (B, R + 2N, L) for Δ, B and C; None for a B or C that is given."""
    rank = t.delta_proj.shape[1]
    free = (t.B is None) + (t.C is None)
    rows = (x_dbl.shape[1] - rank) // free if free else 0
    B = None if t.B is not None else x_dbl[:, rank : rank + rows]
    C = None if t.C is not None else x_dbl[:, x_dbl.shape[1] - rows :]
    return x_dbl[:, :rank], B, C


def matrix(given, rows, bias, rms, eps):
    """B or C as the scan takes it, (B, G, N, L): what is given, or the rows from x with bias and norm."""
    if given is not None:
        return given
    return normed(biased(rows, bias), rms, eps)[:, None]


def biased(v, bias):
    return v if bias is None else v + bias.to(v.dtype)[:, None]


def normed(v, weight, eps):
    """v / sqrt(mean(v²) + eps) · weight over axis 1 of v (B, F, L), in float32; v if weight is None."""
    if weight is None:
        return v
    x_hat, _ = _standard(v, eps)
    return (x_hat * weight.to(x_hat.dtype)[:, None]).to(v.dtype)


def normed_backward(dy, v, weight, eps):
    """The gradients of v and of weight: dv = (g - x̂ mean(g x̂)) / σ with g = dy · weight."""
    if weight is None:
        return dy, None
    x_hat, rstd = _standard(v, eps)
    dy = dy.to(x_hat.dtype)
    g = dy * weight.to(x_hat.dtype)[:, None]
    dv = rstd * (g - x_hat * (g * x_hat).mean(1, keepdim=True))
    return dv.to(v.dtype), (dy * x_hat).sum((0, 2)).to(weight.dtype)


def _standard(v, eps):
    x = v.to(torch.promote_types(v.dtype, torch.float32))
    rstd = torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
    return x * rstd, rstd
