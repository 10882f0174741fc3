"""The block as a PyTorch operator, so that autograd, torch.compile and fake tensors know it.

Plain eager calls go through `torch.autograd.Function` to the same functions: an operator's dispatch costs
host time.
"""

import torch
from torch import Tensor

from mamba_fast.ops.mamba_inner.fused_inner import backward, forward
from mamba_fast.ops.mamba_inner.parts import Settings, Tensors
from mamba_fast.ops.rooms import is_plain
from mamba_fast.ops.selective_scan.registration import _room


def inner(t, settings):
    """out (B, L, E) of checked arguments, differentiable in every tensor of them."""
    keep = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in t)
    if not is_plain(*t):
        return inner_operator(*t, *settings, keep)[0]
    if keep:
        return _Inner.apply(settings, *t)
    return forward(t, settings, False)[0]


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, *tensors):
        t = Tensors(*tensors)
        out, kept = forward(t, settings, True)
        ctx.settings = settings
        ctx.save_for_backward(*t, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        size = len(Tensors._fields)
        saved = ctx.saved_tensors  # once: gradient checkpointing lets them be unpacked one time
        t, kept = Tensors(*saved[:size]), saved[size:]
        return None, *backward(dout, t, ctx.settings, kept)


@torch.library.custom_op("mamba_fast::mamba_inner", mutates_args=())
def inner_operator(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor, delta_proj: Tensor,
    out_proj: Tensor, out_bias: Tensor | None, A: Tensor, B: Tensor | None, C: Tensor | None,
    D: Tensor | None, delta_bias: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None,
    B_rms: Tensor | None, C_rms: Tensor | None, delta_rms: Tensor | None,
    softplus: bool, level: int, eps: float, conv: str, scan: str, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """out (B, L, E) and, if `keep`, what the backward needs."""
    t = Tensors(
        xz, conv_weight, conv_bias, x_proj, delta_proj, out_proj, out_bias, A, B, C, D, delta_bias, B_bias,
        C_bias, B_rms, C_rms, delta_rms,
    )  # fmt: skip
    out, kept = forward(t, Settings(softplus, level, eps, conv, scan), keep)
    return [v.contiguous() for v in (out, *kept)]


@inner_operator.register_fake
def _(xz, conv_weight, conv_bias, x_proj, delta_proj, out_proj, out_bias, A, *rest):
    *_, level, _, _, scan, keep = rest
    batch, twice, seqlen = xz.shape
    out = xz.new_empty(batch, seqlen, out_proj.shape[0])
    if not keep:
        return [out]
    tokens = batch * seqlen
    rows = [xz.new_empty(twice // 2, tokens) for _ in range(0 if level else 3)]
    states = A.new_empty(batch, -(-seqlen // _room(scan).CHUNK), *A.shape)
    return [out, xz.new_empty(x_proj.shape[0], tokens), states, *rows]


@torch.library.custom_op("mamba_fast::mamba_inner_backward", mutates_args=())
def inner_backward(
    dout: Tensor, tensors: list[Tensor], absent: list[bool], kept: list[Tensor],
    softplus: bool, level: int, eps: float, conv: str, scan: str,
) -> list[Tensor]:  # fmt: skip
    """The gradient of each of `tensors`, which are those that are not `absent`."""
    present = iter(tensors)
    t = Tensors(*(None if gone else next(present) for gone in absent))
    grads = backward(dout, t, Settings(softplus, level, eps, conv, scan), kept)
    dxz, *others = (g for g, gone in zip(grads, absent, strict=True) if not gone)
    return _apart([dxz, *(g.contiguous() for g in others)])


@inner_backward.register_fake
def _(dout, tensors, absent, kept, softplus, level, eps, conv, scan):
    xz, *others = tensors
    return [torch.empty_like(xz), *(v.new_empty(v.shape) for v in others)]


def _apart(tensors):
    """What an operator returns may not share memory."""
    taken, apart = set(), []
    for v in tensors:
        memory = v.untyped_storage().data_ptr()
        apart.append(v.clone() if memory in taken else v)
        taken.add(memory)
    return apart


def _setup(ctx, inputs, output):
    size = len(Tensors._fields)
    ctx.save_for_backward(*inputs[:size], *output[1:])
    ctx.settings = inputs[size:-1]
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    size = len(Tensors._fields)
    saved = ctx.saved_tensors
    t, kept = saved[:size], saved[size:]
    absent = [v is None for v in t]
    found = iter(inner_backward(grads[0], [v for v in t if v is not None], absent, list(kept), *ctx.settings))
    return (*(None if gone else next(found) for gone in absent), *(None for _ in range(6)))


inner_operator.register_autograd(_backward, setup_context=_setup)
