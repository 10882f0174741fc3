"""Add, then norm: RMSNorm and LayerNorm behind the residual sum. See README.md in this folder."""

import torch

from mamba_fast.ops import rooms
from mamba_fast.ops.rms_norm.arguments import check, refuse, refuse_dropout
from mamba_fast.ops.rms_norm.registration import fused_norm
from mamba_fast.ops.rms_norm.torch_norm import add_norm as add_norm_torch

__all__ = ["RMSNorm", "layer_norm_fn", "rms_norm_fn"]

MAX_WIDTH = 32768  # a row must fit into the registers of one program


def layer_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, residual_in_fp32=False, is_rms_norm=False, return_dropout_mask=False, *, backend=None,
):  # fmt: skip
    """s = x + residual, y = (s - mean(s)) / sqrt(var(s) + eps) weight + bias over the last axis.

    Parameters
    ----------
    x, residual : (..., M), any float type. Without a residual s = x.
    weight, bias : (M,), any float type. bias may be None.
    x1, weight1, bias1, dropout_p, rowscale, return_dropout_mask : of the published signature; not
        supported, their defaults alone are accepted
    eps : added to the variance
    prenorm : also return s, the residual of the next block
    residual_in_fp32 : without a residual, s is at least float32. With one, s has the residual's type.
    is_rms_norm : y = s / sqrt(mean(s²) + eps) weight + bias
    backend : None (Triton on a GPU for M up to 32768, else PyTorch), "torch" or "triton"

    Returns
    -------
    y (..., M) in x's type, or (y, s). Both are differentiable in x, residual, weight and bias; the
    torch backend twice.

    Raises
    ------
    TypeError, ValueError : name the argument, what came and what is accepted

    Notes
    -----
    Computed in float32 (float64 where an argument is float64): the norm reads s before it is rounded.
    With bfloat16 x and float32 residual, bytes a number: forward 2 + 4 in, 2 + 4 out; backward
    2 + 4 + 4 in, 2 + 4 out. About 6 operations a number forward, 12 backward.
    """
    refuse(x1, weight1, bias1, dropout_p, rowscale, return_dropout_mask)
    return _norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, bool(is_rms_norm), backend)


def rms_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, residual_in_fp32=False, return_dropout_mask=False, *, backend=None,
):  # fmt: skip
    """s = x + residual, y = s / sqrt(mean(s²) + eps) weight + bias: `layer_norm_fn` with is_rms_norm=True."""
    refuse(x1, weight1, bias1, dropout_p, rowscale, return_dropout_mask)
    return _norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True, backend)


class RMSNorm(torch.nn.Module):
    """`rms_norm_fn` with its weight (hidden_size,), which starts at one; bias is None.

    forward(x, residual=None, prenorm=False, residual_in_fp32=False) as there. dropout_p must be 0.
    """

    def __init__(self, hidden_size, eps=1e-5, dropout_p=0.0, device=None, dtype=None):
        super().__init__()
        refuse_dropout(dropout_p)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        return rms_norm_fn(
            x, self.weight, self.bias, residual=residual, eps=self.eps, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip


def _norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, rms, backend):
    check(x, weight, bias, residual)
    given = (x, weight, bias, residual)
    too_wide = f"x has rows of more than {MAX_WIDTH} numbers" if x.shape[-1] > MAX_WIDTH else None
    name = rooms.choose("rms_norm" if rms else "layer_norm", x, given, backend, too_wide)
    if residual is not None:
        sum_dtype = residual.dtype
    else:
        sum_dtype = torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype
    is_x = residual is None and sum_dtype == x.dtype  # then s is x itself
    if name == "torch":
        y, s = add_norm_torch(x, weight, bias, residual, eps, sum_dtype, rms)
    else:
        y, s = fused_norm(x, weight, bias, residual, float(eps), sum_dtype, rms, prenorm and not is_x)
    return (y, x if is_x else s) if prenorm else y
