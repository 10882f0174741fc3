"""Add and norm in Triton as PyTorch operators, so that autograd, torch.compile and fake tensors know them.

Plain eager calls go through `torch.autograd.Function` to the same functions: an operator's dispatch costs
more host time than the rest of a call.
"""

import functools
import importlib

import torch
from torch import Tensor

from mamba_fast.ops.rooms import is_plain


@functools.cache
def _room():
    return importlib.import_module(f"{__package__}.triton_norm")


def fused_norm(x, weight, bias, residual, eps, sum_dtype, rms, store):
    """(y, s = x + residual if `store`) of checked arguments, differentiable in every tensor of them."""
    keep = torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if not is_plain(x, weight, bias, residual):
        return add_norm(x, weight, bias, residual, eps, sum_dtype, rms, store, keep)[:2]
    if keep:
        return _Norm.apply(x, weight, bias, residual, eps, sum_dtype, rms, store, keep)
    return _room().forward(x, weight, bias, residual, eps, sum_dtype, rms, store, keep)[:2]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _room().forward(*inputs)
        _setup(ctx, inputs, output)
        y, s, _, _ = output
        return y, s if ctx.stored else None

    @staticmethod
    def backward(ctx, dy, ds):
        # With create_graph the operator is what refuses a second derivative.
        direct = not torch.is_grad_enabled() and is_plain(dy, ds)
        return _backward(ctx, dy, ds, run=_room().backward if direct else add_norm_backward)


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
    x, weight, bias, residual, _, _, rms, ctx.stored, _ = inputs
    _, s, mean, rstd = output
    ctx.set_materialize_grads(False)
    exact = ctx.stored and s.dtype == torch.float32  # a rounded sum is found again from its terms
    ctx.save_for_backward(*((s, None) if exact else (x, residual)), weight, bias, mean, rstd)
    ctx.settings = (x.dtype, None if residual is None else residual.dtype, rms)


def _backward(ctx, dy, ds, *_, run=add_norm_backward):
    s, residual, weight, bias, mean, rstd = ctx.saved_tensors
    x_dtype, residual_dtype, rms = ctx.settings
    dy = torch.zeros_like(s, dtype=x_dtype) if dy is None else dy
    ds = ds if ctx.stored else None
    dx, dresidual, dweight, dbias = run(
        dy, ds, s, residual, weight, bias, mean, rstd, x_dtype, residual_dtype, rms
    )
    if residual_dtype in (None, x_dtype):
        dresidual = None if residual_dtype is None else dx
    return dx, dweight, None if bias is None else dbias, dresidual, None, None, None, None, None


def _twice(ctx, *_):
    raise RuntimeError(
        "layer_norm_fn, rms_norm_fn: the triton backend is differentiable once, and a second derivative was "
        "asked for; the torch backend is differentiable twice"
    )


add_norm.register_autograd(_backward, setup_context=_setup)
add_norm_backward.register_autograd(_twice)
