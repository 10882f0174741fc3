"""Add and norm in Triton as PyTorch operators, so that autograd, torch.compile and fake tensors know them."""

import importlib

import torch
from torch import Tensor


def _room():
    return importlib.import_module(f"{__package__}.triton_norm")


@torch.library.custom_op("mamba_fast::add_norm", mutates_args=())
def add_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float,
    sum_dtype: torch.dtype, rms: bool, store: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, s = x + residual if `store`, mean a row, 1 / std a row if `keep`) of checked arguments."""
    return _room().forward(x, weight, bias, residual, eps, sum_dtype, rms, store, keep)


@add_norm.register_fake
def _(x, weight, bias, residual, eps, sum_dtype, rms, store, keep):
    rows = x.numel() // x.shape[-1] if keep else 0
    mean = x.new_empty(0 if rms else rows, dtype=torch.float32)
    s = x.new_empty(x.shape if store else 0, dtype=sum_dtype)
    return x.new_empty(x.shape), s, mean, x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("mamba_fast::add_norm_backward", mutates_args=())
def add_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, x_dtype: torch.dtype, residual_dtype: torch.dtype | None, rms: bool,
) -> list[Tensor]:  # fmt: skip
    """dx, dresidual, dweight, dbias; empty where there is none, or where dresidual is dx.

    The norm was that of s, or of s + residual if residual is given.
    """
    grads = _room().backward(dy, ds, s, residual, weight, bias, mean, rstd, x_dtype, residual_dtype, rms)
    return [dy.new_empty(0) if g is None else g for g in grads]


@add_norm_backward.register_fake
def _(dy, ds, s, residual, weight, bias, mean, rstd, x_dtype, residual_dtype, rms):
    apart = residual_dtype not in (None, x_dtype)
    return [
        dy.new_empty(dy.shape, dtype=x_dtype),
        dy.new_empty(dy.shape, dtype=residual_dtype) if apart else dy.new_empty(0),
        weight.new_empty(weight.shape),
        dy.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    ]


def _setup(ctx, inputs, output):
    x, weight, bias, residual, _, _, rms, store, _ = inputs
    _, s, mean, rstd = output
    ctx.set_materialize_grads(False)
    exact = store and s.dtype == torch.float32  # a rounded sum is found again from its terms
    ctx.save_for_backward(*((s, None) if exact else (x, residual)), weight, bias, mean, rstd)
    ctx.settings = (x.dtype, None if residual is None else residual.dtype, rms, store)


def _backward(ctx, dy, ds, *_):
    s, residual, weight, bias, mean, rstd = ctx.saved_tensors
    x_dtype, residual_dtype, rms, stored = ctx.settings
    dy = torch.zeros_like(s, dtype=x_dtype) if dy is None else dy
    ds = ds if stored else None
    dx, dresidual, dweight, dbias = add_norm_backward(
        dy, ds, s, residual, weight, bias, mean, rstd, x_dtype, residual_dtype, rms
    )
    if residual_dtype in (None, x_dtype):
        dresidual = None if residual_dtype is None else dx
    return dx, dweight, None if bias is None else dbias, dresidual, None, None, None, None, None


add_norm.register_autograd(_backward, setup_context=_setup)
