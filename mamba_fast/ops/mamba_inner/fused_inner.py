"""The block by the fused kernels, with every (B, F, L) in the memory of one matrix (F, B L).

For a projection that matrix is an operand as it lies, one product for all tokens. For the convolution and
the scan it is (B, F, L) with strides (L, B L, 1), each row of time steps side by side.
"""

import importlib

import torch
import torch.nn.functional as F

from mamba_fast.ops.causal_conv1d.torch_conv import causal_conv_torch
from mamba_fast.ops.mamba_inner.parts import (
    as_batch,
    as_matrix,
    biased,
    matrix,
    normed,
    normed_backward,
    split_rows,
)
from mamba_fast.ops.rooms import on_device_of
from mamba_fast.ops.selective_scan.registration import _room


def forward(t, settings, keep):
    """out (B, L, E), and what the backward needs if `keep`: x_dbl, states; at level 0 also y, u and delta.

    All of these but the states are matrices, (F, B L).
    """
    batch, _, seqlen = t.xz.shape
    x, z = t.xz.chunk(2, dim=1)
    u = _conv(x, t, settings)
    x_dbl = torch.mm(t.x_proj, as_matrix(u))  # (R + 2N, B L)
    _, delta, B, C = _scan_inputs(t, settings, x_dbl, batch)
    y, _, states = _room(settings.scan).forward(
        u, delta, t.A, B, C, t.D, z, t.delta_bias, None, None, settings.softplus, False, batch, keep
    )
    y = as_matrix(y)
    out = _narrow(y, t, batch, seqlen)
    if not keep:
        return out, ()
    return out, (x_dbl, states, *((y, as_matrix(u), as_matrix(delta)) if settings.level == 0 else ()))


def backward(dout, t, settings, kept):
    """The gradient of each of `t`; None where there is none to have."""
    batch = t.xz.shape[0]
    x_dbl, states, *rest = kept
    x, z = t.xz.chunk(2, dim=1)
    dxz = torch.empty_like(t.xz)
    dx, dz = dxz.chunk(2, dim=1)
    dout = dout.flatten(0, 1)  # (B L, E)
    y, u, delta = rest or (x.new_empty(len(t.A), len(dout)), None, None)
    u = _conv(x, t, settings) if u is None else as_batch(u, batch)
    dt, delta, B, C = _scan_inputs(t, settings, x_dbl, batch, delta)
    dout_bias = None if t.out_bias is None else dout.sum(0)
    dy = as_batch(torch.mm(t.out_proj.T, dout.T), batch)
    dlast = None if settings.scan == "cuda" else t.A.new_zeros(batch, *t.A.shape)  # of an unused last state
    du, ddelta, dA, dB, dC, dD, _, ddelta_bias, _ = _room(settings.scan).backward(
        dy, dlast, u, delta, t.A, B, C, t.D, z, t.delta_bias, None, settings.softplus, False, batch, states,
        None, torch.are_deterministic_algorithms_enabled(), dz=dz,
        y=None if rest else as_batch(y, batch),
    )  # fmt: skip
    dout_proj = torch.mm(dout.T, y.T)
    del y  # found again at level 1: its memory is free for what follows
    if t.delta_rms is not None:
        delta = as_batch(torch.mm(t.delta_proj, dt), batch)  # before its norm
    ddelta, ddelta_rms = normed_backward(ddelta, delta, t.delta_rms, settings.eps)
    _, B_rows, C_rows = split_rows(t, as_batch(x_dbl, batch))
    dB_rows, dB_bias, dB_rms, dB = _matrix_backward(dB, t.B, B_rows, t.B_bias, t.B_rms, settings.eps)
    dC_rows, dC_bias, dC_rms, dC = _matrix_backward(dC, t.C, C_rows, t.C_bias, t.C_rms, settings.eps)
    ddelta, u = as_matrix(ddelta), as_matrix(u)
    dx_dbl = torch.empty_like(x_dbl)
    torch.mm(t.delta_proj.T, ddelta, out=dx_dbl[: len(dt)])
    _write_rows(dx_dbl[len(dt) :], dB_rows, dC_rows)
    ddelta_proj = torch.mm(ddelta, dt.T)
    dx_proj = torch.mm(dx_dbl, u.T)
    du = as_batch(as_matrix(du).addmm_(t.x_proj.T, dx_dbl), batch)
    dconv_weight, dconv_bias = _conv_backward(du, x, t, settings, dx)
    return (
        dxz, dconv_weight, dconv_bias, dx_proj, ddelta_proj, dout_proj, dout_bias, dA, dB, dC, dD,
        ddelta_bias, dB_bias, dC_bias, dB_rms, dC_rms, ddelta_rms,
    )  # fmt: skip


def _narrow(y, t, batch, seqlen):
    """out (B, L, E), no view of the product: autograd forbids to change a view in place."""
    out = y.new_empty(batch, seqlen, len(t.out_proj))
    tokens = out.flatten(0, 1)
    if t.out_bias is None:
        torch.mm(y.T, t.out_proj.T, out=tokens)
    else:
        torch.addmm(t.out_bias, y.T, t.out_proj.T, out=tokens)
    return out


def _scan_inputs(t, settings, x_dbl, batch, delta=None):
    """Δ's rank as a matrix (R, B L), delta (B, D, L), B and C (B, G, N, L)."""
    dt, B, C = split_rows(t, as_batch(x_dbl, batch))
    dt = as_matrix(dt)
    if delta is None:
        delta = normed(as_batch(torch.mm(t.delta_proj, dt), batch), t.delta_rms, settings.eps)
    else:
        delta = as_batch(delta, batch)
    B = matrix(t.B, B, t.B_bias, t.B_rms, settings.eps)
    return dt, delta, B, matrix(t.C, C, t.C_bias, t.C_rms, settings.eps)


def _matrix_backward(dM, given, rows, bias, rms, eps):
    """The gradients of the rows of x_dbl, of bias and norm, or of a B or C that was given."""
    if given is not None:
        return None, None, None, dM
    drows, drms = normed_backward(dM[:, 0], biased(rows, bias), rms, eps)
    dbias = None if bias is None else drows.sum((0, 2), dtype=_wide(drows)).to(bias.dtype)
    return drows, dbias, drms, None


def _write_rows(place, *rows):
    """What is there of the rows (B, F, L), one after the other, into place (., B L): one launch."""
    rows = [v.transpose(0, 1) for v in rows if v is not None]
    if rows:
        torch.cat(rows, out=place.view(len(place), *rows[0].shape[1:]))


def _wide(v):
    return torch.promote_types(v.dtype, torch.float32)


def _conv(x, t, settings):
    """u = SiLU(conv(x)), (B, D, L), in the memory of a matrix whatever the layout of x."""
    batch, channels, seqlen = x.shape
    if settings.conv == "torch":
        return as_batch(as_matrix(causal_conv_torch(x, t.conv_weight, t.conv_bias, None, None, True)), batch)
    u = as_batch(x.new_empty(channels, batch * seqlen), batch)
    with on_device_of(x):
        return _triton_conv().forward(x, t.conv_weight, t.conv_bias, None, None, True, False, y=u)[0]


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
