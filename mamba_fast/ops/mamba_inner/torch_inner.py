"""The block in plain PyTorch: any device, any float type, complex A, twice differentiable."""

import torch.nn.functional as F

from mamba_fast.ops.causal_conv1d.torch_conv import causal_conv_torch
from mamba_fast.ops.mamba_inner.parts import biased, matrix, normed, split_rows
from mamba_fast.ops.selective_scan.arguments import Arguments
from mamba_fast.ops.selective_scan.torch_scan import selective_scan_torch


def inner_torch(t, settings):
    """out (B, L, E) of checked arguments. Autograd keeps every intermediate result."""
    x, z = t.xz.chunk(2, dim=1)
    u = causal_conv_torch(x, t.conv_weight, t.conv_bias, None, None, True)
    dt, B, C = split_rows(t, t.x_proj @ u)
    delta = normed(t.delta_proj @ dt, t.delta_rms, settings.eps)
    if t.A.is_complex():
        B, C = _in_pairs(t.B, B, t.B_bias), _in_pairs(t.C, C, t.C_bias)
    else:
        B = matrix(t.B, B, t.B_bias, t.B_rms, settings.eps)
        C = matrix(t.C, C, t.C_bias, t.C_rms, settings.eps)
    args = Arguments(u, delta, t.A, B, C, t.D, z, t.delta_bias, None, None, settings.softplus, False, len(u))
    y, _ = selective_scan_torch(*args)
    return F.linear(y.mT, t.out_proj, t.out_bias)


def _in_pairs(given, rows, bias):
    """Rows (B, 2N, L), re and im of a state in turn, as (B, 1, N, 2L), re and im of a step in turn."""
    if given is not None:
        return given
    return biased(rows, bias).unflatten(1, (-1, 2)).mT.flatten(2)[:, None]
