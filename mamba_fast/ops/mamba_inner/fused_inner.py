"""The block by the fused kernels: every tensor keeps its time steps where they are, nothing is rearranged.

x_proj and delta_proj multiply from the left, so that Δ, B and C come out as the scan reads them.
"""

import importlib

import torch
import torch.nn.functional as F

from mamba_fast.ops.causal_conv1d.torch_conv import causal_conv_torch
from mamba_fast.ops.mamba_inner.parts import biased, matrix, normed, normed_backward, split_rows
from mamba_fast.ops.rooms import on_device_of
from mamba_fast.ops.selective_scan.registration import _room


def forward(t, settings, keep):
    """out (B, L, E), and what the backward needs if `keep`: x_dbl, y, states; at level 0 also u and delta."""
    batch = t.xz.shape[0]
    x, z = t.xz.chunk(2, dim=1)
    u = _conv(x, t, settings)
    x_dbl = torch.bmm(t.x_proj.expand(batch, -1, -1), u)  # (B, R + 2N, L)
    _, delta, B, C = _scan_inputs(t, settings, x_dbl)
    y, _, states = _room(settings.scan).forward(
        u, delta, t.A, B, C, t.D, z, t.delta_bias, None, None, settings.softplus, False, batch, keep
    )
    weight = t.out_proj.T.expand(batch, -1, -1)
    out = torch.bmm(y.mT, weight) if t.out_bias is None else torch.baddbmm(t.out_bias, y.mT, weight)
    if not keep:
        return out, ()
    return out, (x_dbl, y, states, *((u, delta) if settings.level == 0 else ()))


def backward(dout, t, settings, kept):
    """The gradient of each of `t`; None where there is none to have."""
    batch = t.xz.shape[0]
    x_dbl, y, states, *rest = kept
    x, z = t.xz.chunk(2, dim=1)
    u = rest[0] if rest else _conv(x, t, settings)
    dt, delta, B, C = _scan_inputs(t, settings, x_dbl, rest[1] if rest else None)
    dout_proj = _summed(torch.bmm(dout.mT, y.mT), t.out_proj)
    dout_bias = None if t.out_bias is None else dout.sum((0, 1), dtype=_wide(dout)).to(t.out_bias.dtype)
    dy = torch.bmm(t.out_proj.T.expand(batch, -1, -1), dout.mT)  # (B, D, L)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, _ = _room(settings.scan).backward(
        dy, t.A.new_zeros(batch, *t.A.shape), u, delta, t.A, B, C, t.D, z, t.delta_bias, None,
        settings.softplus, False, batch, states, None, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    if t.delta_rms is not None:
        delta = torch.bmm(t.delta_proj.expand(batch, -1, -1), dt)  # before its norm
    ddelta, ddelta_rms = normed_backward(ddelta, delta, t.delta_rms, settings.eps)
    _, B_rows, C_rows = split_rows(t, x_dbl)
    dB_rows, dB_bias, dB_rms, dB = _matrix_backward(dB, t.B, B_rows, t.B_bias, t.B_rms, settings.eps)
    dC_rows, dC_bias, dC_rms, dC = _matrix_backward(dC, t.C, C_rows, t.C_bias, t.C_rms, settings.eps)
    ddt = torch.bmm(t.delta_proj.T.expand(batch, -1, -1), ddelta)
    dx_dbl = torch.cat([v for v in (ddt, dB_rows, dC_rows) if v is not None], dim=1)
    ddelta_proj = _summed(torch.bmm(ddelta, dt.mT), t.delta_proj)
    dx_proj = _summed(torch.bmm(dx_dbl, u.mT), t.x_proj)
    du = torch.baddbmm(du, t.x_proj.T.expand(batch, -1, -1), dx_dbl)
    dxz = torch.empty_like(t.xz)
    dx_place, dz_place = dxz.chunk(2, dim=1)
    dz_place.copy_(dz)
    dconv_weight, dconv_bias = _conv_backward(du, x, t, settings, dx_place)
    return (
        dxz, dconv_weight, dconv_bias, dx_proj, ddelta_proj, dout_proj, dout_bias, dA, dB, dC, dD,
        ddelta_bias, dB_bias, dC_bias, dB_rms, dC_rms, ddelta_rms,
    )  # fmt: skip


def _scan_inputs(t, settings, x_dbl, delta=None):
    """Δ's rank (B, R, L), delta (B, D, L), B and C (B, G, N, L)."""
    dt, B, C = split_rows(t, x_dbl)
    if delta is None:
        delta = torch.bmm(t.delta_proj.expand(len(dt), -1, -1), dt)
        delta = normed(delta, t.delta_rms, settings.eps)
    B = matrix(t.B, B, t.B_bias, t.B_rms, settings.eps)
    return dt, delta, B, matrix(t.C, C, t.C_bias, t.C_rms, settings.eps)


def _matrix_backward(dM, given, rows, bias, rms, eps):
    """The gradients of the rows of x_dbl, of bias and norm, or of a B or C that was given."""
    if given is not None:
        return None, None, None, dM
    drows, drms = normed_backward(dM[:, 0], biased(rows, bias), rms, eps)
    dbias = None if bias is None else drows.sum((0, 2), dtype=_wide(drows)).to(bias.dtype)
    return drows, dbias, drms, None


def _summed(products, weight):
    """A weight's gradient from its shares (B, ., .): added up in float32, rounded once."""
    return products.sum(0, dtype=_wide(products)).to(weight.dtype)


def _wide(v):
    return torch.promote_types(v.dtype, torch.float32)


def _conv(x, t, settings):
    """u = SiLU(conv(x)), (B, D, L)."""
    if settings.conv == "torch":
        return causal_conv_torch(x, t.conv_weight, t.conv_bias, None, None, True)
    with on_device_of(x):
        return _triton_conv().forward(x, t.conv_weight, t.conv_bias, None, None, True, False)[0]


def _conv_backward(du, x, t, settings, dx):
    """The gradients of weight and bias; that of x is written into `dx`."""
    if settings.conv == "torch":
        return _conv_backward_torch(du, x, t.conv_weight, t.conv_bias, dx)
    with on_device_of(x):
        room = _triton_conv()
        return room.backward(du, None, x, t.conv_weight, t.conv_bias, None, None, True, dx=dx)[1:3]


def _triton_conv():
    return importlib.import_module("mamba_fast.ops.causal_conv1d.triton_conv")


def _conv_backward_torch(du, x, weight, bias, dx):
    """By the formulas of ../causal_conv1d/README.md, with shifted views."""
    width, seqlen = weight.shape[1], x.shape[2]
    wide = weight.to(_wide(x))
    seen = F.pad(x.to(_wide(x)), (width - 1, 0))  # step t stands at t + W - 1
    p = sum(wide[:, k, None] * seen[..., k : k + seqlen] for k in range(width))
    p = p if bias is None else p + bias.to(p.dtype)[:, None]
    s = torch.sigmoid(p)
    dp = F.pad(du.to(p.dtype) * (s + p * s * (1 - s)), (0, width - 1))
    dx.copy_(sum(wide[:, k, None] * dp[..., width - 1 - k : width - 1 - k + seqlen] for k in range(width)))
    dp = dp[..., :seqlen]
    dweight = torch.stack([(dp * seen[..., k : k + seqlen]).sum((0, 2)) for k in range(width)], 1)
    dbias = None if bias is None else dp.sum((0, 2)).to(bias.dtype)
    return dweight.to(weight.dtype), dbias
