"""The kernels as PyTorch operators, so that autograd, torch.compile and fake tensors know them.

They are defined with the functions of `torch.library` beneath its decorator: on a GPU the decorator's
own Python would take longer than a short sequence's kernel.
"""

import functools
import importlib

import torch

from mamba_fast.ops.causal_conv1d.torch_conv import update_torch
from mamba_fast.ops.rooms import on_device_of

_LIBRARY = torch.library.Library("mamba_fast", "FRAGMENT")
_OPERATORS = torch.ops.mamba_fast


def _operator(schema):
    """Define an operator: what it decorates runs on any device."""

    def decorate(function):
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        name = schema.split("(")[0]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(_OPERATORS, name).default

    return decorate


@functools.cache
def _triton():
    return importlib.import_module(f"{__package__}.triton_conv")


@_operator(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, "
    "bool silu, bool want_final) -> (Tensor, Tensor)"
)
def conv(x, weight, bias, seq_idx, initial_states, silu, want_final):
    """(y, final states) of checked arguments; the final states are empty if nobody wants them."""
    with on_device_of(x):
        return _triton().forward(x, weight, bias, seq_idx, initial_states, silu, want_final)


@torch.library.register_fake("mamba_fast::causal_conv1d", lib=_LIBRARY)
def _(x, weight, bias, seq_idx, initial_states, silu, want_final):
    shape = (*x.shape[:2], weight.shape[1] - 1) if want_final else (0,)
    return torch.empty_like(x), x.new_empty(shape)


@_operator(
    "causal_conv1d_backward(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? seq_idx, Tensor? initial_states, bool silu) -> (Tensor, Tensor, Tensor, Tensor)"
)
def conv_backward(dy, dfinal, x, weight, bias, seq_idx, initial_states, silu):
    """dx, dweight, dbias, dinitial_states; empty where the input is absent."""
    with on_device_of(x):
        grads = _triton().backward(dy, dfinal, x, weight, bias, seq_idx, initial_states, silu)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("mamba_fast::causal_conv1d_backward", lib=_LIBRARY)
def _(dy, dfinal, x, weight, bias, seq_idx, initial_states, silu):
    dbias, dinit = (x.new_empty(0) if v is None else torch.empty_like(v) for v in (bias, initial_states))
    return torch.empty_like(x), weight.new_empty(weight.shape), dbias, dinit


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, seq_idx, initial_states, silu, want_final):
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_states)
        ctx.silu, ctx.want_final = silu, want_final
        with torch._C._AutoDispatchBelowAutograd():
            return conv(x, weight, bias, seq_idx, initial_states, silu, want_final)

    @staticmethod
    def backward(ctx, dy, dfinal):
        x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
        dx, dweight, dbias, dinit = conv_backward(
            dy, dfinal if ctx.want_final else None, x, weight, bias, seq_idx, initial_states, ctx.silu
        )
        dbias, dinit = None if bias is None else dbias, None if initial_states is None else dinit
        return dx, dweight, dbias, None, dinit, None, None


def _with_autograd(*args):
    if torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in args):
        return _Conv.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return conv(*args)


_LIBRARY.impl("causal_conv1d", _with_autograd, "Autograd")


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operator, *args):
        ctx.name = operator.name()
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError(f"{ctx.name} has no gradient")


def _without_autograd(operator):
    def call(*args):
        if torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in args):
            return _NoGradient.apply(operator, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    _LIBRARY.impl(operator.name(), call, "Autograd")


@_operator(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? cache_seqlens, Tensor? conv_state_indices, int pad_slot_id, str backend) -> Tensor"
)
def conv_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, pad_slot_id, backend):
    """y of the tokens x (B, D, T); conv_state takes them in."""
    update = update_torch if backend == "torch" else _triton().update
    with on_device_of(x):
        return update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, pad_slot_id)


@torch.library.register_fake("mamba_fast::causal_conv1d_update", lib=_LIBRARY)
def _(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, pad_slot_id, backend):
    return torch.empty_like(x)


@_operator("causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, int state_len) -> Tensor")
def varlen_states(x, cu_seqlens, state_len):
    """(B, D, state_len): the last tokens of each packed sequence of x (T, D)."""
    with on_device_of(x):
        return _triton().varlen_states(x, cu_seqlens, state_len)


@torch.library.register_fake("mamba_fast::causal_conv1d_varlen_states", lib=_LIBRARY)
def _(x, cu_seqlens, state_len):
    return x.new_empty(cu_seqlens.shape[0] - 1, state_len, x.shape[1]).transpose(1, 2)


_without_autograd(conv_backward)
_without_autograd(conv_update)
_without_autograd(varlen_states)
