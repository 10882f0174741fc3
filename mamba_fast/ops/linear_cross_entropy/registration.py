"""The op for PyTorch, so that autograd, torch.compile and fake tensors know it.

Plain eager calls go through `torch.autograd.Function` to the same functions: an operator's dispatch costs
host time.
"""

import torch
from torch import Tensor

from mamba_fast.ops.linear_cross_entropy.arguments import check_labels
from mamba_fast.ops.linear_cross_entropy.chunks import losses_and_gradients
from mamba_fast.ops.rooms import is_plain


def fused_loss(hidden, weight, bias, labels, dtype, vocab_size, ignore_index, reduction, room, keep):
    """The loss of checked arguments, differentiable once in what `keep` says of hidden, weight and bias."""
    given = (hidden, weight, bias, labels, dtype, vocab_size, ignore_index, reduction, room, keep)
    if not is_plain(hidden, weight, bias, labels):
        return linear_cross_entropy(*given)[0]
    if any(keep):
        return _Loss.apply(*given)
    return _forward(*given)[0]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, dloss):
        # With create_graph the operator is what refuses a second derivative.
        direct = not torch.is_grad_enabled() and is_plain(dloss)
        return _backward(ctx, dloss, run=_gradients if direct else linear_cross_entropy_backward)


def _forward(hidden, weight, bias, labels, dtype, vocab_size, ignore_index, reduction, room, keep):
    check_labels(labels, vocab_size, ignore_index)
    now = [want and reduction != "none" for want in keep]
    given = (hidden, weight, bias, labels, None, dtype, vocab_size, ignore_index, room, now)
    with torch.autocast(hidden.device.type, enabled=False):
        losses, *grads = losses_and_gradients(*given)
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / (labels != ignore_index).sum()
    return loss, *(losses.new_empty(0) if g is None else g for g in grads)


def _gradients(
    dloss, hidden, weight, bias, labels, grads, dtype, vocab_size, ignore_index, reduction, room, keep
):
    if reduction == "none":
        scale = dloss.contiguous()
        given = (hidden, weight, bias, labels, scale, dtype, vocab_size, ignore_index, room, keep)
        with torch.autocast(hidden.device.type, enabled=False):
            _, *grads = losses_and_gradients(*given)
    else:
        count = (labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1
        factor = dloss / count
        grads = [g * factor if want else None for g, want in zip(grads, keep, strict=True)]
    given = (hidden, weight, bias)
    return [hidden.new_empty(0) if g is None else g.to(v.dtype) for g, v in zip(grads, given, strict=True)]


@torch.library.custom_op("mamba_fast::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype,
    vocab_size: int, ignore_index: int, reduction: str, room: str, keep: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss; for "mean" and "sum" also the gradients of the sum of losses, where `keep` asks."""
    return _forward(hidden, weight, bias, labels, dtype, vocab_size, ignore_index, reduction, room, keep)


@linear_cross_entropy.register_fake
def _(hidden, weight, bias, labels, dtype, vocab_size, ignore_index, reduction, room, keep):
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    now = [want and reduction != "none" for want in keep]
    grads = [
        hidden.new_empty(shape if want else 0, dtype=kind if want else wide)
        for shape, want, kind in zip(shapes, now, (dtype, wide, wide), strict=True)
    ]
    return hidden.new_empty(len(labels) if reduction == "none" else (), dtype=wide), *grads


@torch.library.custom_op("mamba_fast::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    dloss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, grads: list[Tensor],
    dtype: torch.dtype, vocab_size: int, ignore_index: int, reduction: str, room: str, keep: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of hidden, weight and bias in their types: the kept ones scaled, or found now."""
    settings = (dtype, vocab_size, ignore_index, reduction, room, keep)
    return _gradients(dloss, hidden, weight, bias, labels, grads, *settings)


@linear_cross_entropy_backward.register_fake
def _(dloss, hidden, weight, bias, labels, grads, dtype, vocab_size, ignore_index, reduction, room, keep):
    given = (hidden, weight, bias)
    return [
        hidden.new_empty(0) if not want else v.new_empty(v.shape) for v, want in zip(given, keep, strict=True)
    ]


def _setup(ctx, inputs, output):
    *tensors, dtype, vocab_size, ignore_index, reduction, room, keep = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.settings = (dtype, vocab_size, ignore_index, reduction, room, list(keep))
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_, run=linear_cross_entropy_backward):
    hidden, weight, bias, labels, *grads = ctx.saved_tensors
    if dloss is None:
        return (None,) * 10
    found = run(dloss, hidden, weight, bias, labels, grads, *ctx.settings)
    keep = ctx.settings[-1]
    return *(g if want else None for g, want in zip(found, keep, strict=True)), *(None,) * 7


def _twice(ctx, *_):
    raise RuntimeError("linear_cross_entropy_fn: differentiable once, and a second derivative was asked for")


linear_cross_entropy.register_autograd(_backward, setup_context=_setup)
linear_cross_entropy_backward.register_autograd(_twice)
