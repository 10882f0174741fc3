"""The head and its loss without the logits. See README.md in this folder."""

import math

import torch

from mamba_fast.ops import rooms
from mamba_fast.ops.linear_cross_entropy.arguments import check, product_dtype
from mamba_fast.ops.linear_cross_entropy.registration import fused_loss

__all__ = ["linear_cross_entropy_fn"]


def linear_cross_entropy_fn(
    hidden_states, weight, labels, *, bias=None, ignore_index=-100, reduction="mean", vocab_size=None,
    backend=None,
):  # fmt: skip
    """loss_t = log Σ_v exp(p_tv) - p_t,label_t, and the logits p = hidden_states weightᵀ + bias are not held.

    Parameters
    ----------
    hidden_states : (..., E), float32, float16, bfloat16, or float64 (torch backend)
    weight, bias : (V, E), and (V,) or None, in the type of hidden_states, or of any under autocast
    labels : (...), int32 or int64: from 0 to vocab_size - 1, or ignore_index
    ignore_index : a token with this label has no loss and no gradient
    reduction : "mean" over the tokens that are not ignored (NaN if all are), "sum", or "none"
    vocab_size : columns from here on are padding: no probability, no gradient. None: V, none is
    backend : None (Triton on a GPU, else PyTorch), "torch" or "triton"

    Returns
    -------
    The loss, (), or labels' shape with "none"; float32, or float64 for float64. Differentiable in
    hidden_states, weight and bias, once. Under autocast the products run in its type, as F.linear's do.

    Raises
    ------
    TypeError, ValueError : name the argument, what came and what is accepted. On a GPU nobody waits to
        look at labels: the loss of one that is out of range is NaN, and so is a mean or sum with it.

    Notes
    -----
    Of T tokens, 2 T V E operations for the loss and twice as many for its gradients, which "mean" and
    "sum" find on the way: the backward only scales them, T E numbers and V E in float32. With "none" the
    backward finds the logits again, 2 T V E more. Held beside them: one chunk of logits, at most 256 MiB.
    """
    check(hidden_states, weight, bias, labels, ignore_index, reduction, vocab_size)
    given = (hidden_states, weight, bias)
    name = rooms.choose("linear_cross_entropy_fn", hidden_states, given, backend)
    keep = [torch.is_grad_enabled() and v is not None and v.requires_grad for v in given]
    hidden = hidden_states.reshape(math.prod(labels.shape), weight.shape[1])
    valid = len(weight) if vocab_size is None else int(vocab_size)
    loss = fused_loss(
        hidden, weight, bias, labels.reshape(-1), product_dtype(hidden_states), valid, ignore_index,
        reduction, name, keep,
    )  # fmt: skip
    return loss.reshape(labels.shape) if reduction == "none" else loss
