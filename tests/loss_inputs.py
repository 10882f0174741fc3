"""Inputs of the fused head and loss, PyTorch's two functions beside it, and the comparison of both."""

import torch
import torch.nn.functional as F

from mamba_fast import linear_cross_entropy_fn
from mamba_ref.checks import Row, bounds, errors

FLOAT = torch.float32


def inputs_of(leading, width, columns, seed=0, dtype=FLOAT, bias=True, ignored=0.3, device="cpu"):
    """hidden_states, weight, bias and labels by name; about `ignored` of the labels are -100."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    labels = torch.randint(columns, leading, generator=generator)
    labels = labels.masked_fill(torch.rand(leading, generator=generator) < ignored, -100)
    return dict(
        hidden_states=normal(*leading, width), weight=normal(columns, width),
        bias=normal(columns) if bias else None, labels=labels.to(device),
    )  # fmt: skip


def plain(hidden_states, weight, bias, labels, reduction="mean", ignore_index=-100, vocab_size=None):
    """The same with all logits in memory; softmax and loss are computed in float32 at least."""
    logits = F.linear(hidden_states, weight, bias)[..., :vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, FLOAT)).reshape(-1, logits.shape[-1])
    options = {"reduction": reduction, "ignore_index": ignore_index}
    loss = F.cross_entropy(logits, labels.flatten().long(), **options)
    return loss.reshape(labels.shape) if reduction == "none" else loss


def outcome(function, inputs, **options):
    """The loss and every gradient by name; the cotangent depends on the shape alone."""
    floats = {
        k: v.detach().clone().requires_grad_() for k, v in inputs.items() if k != "labels" and v is not None
    }
    loss = function(**inputs | floats, **options)
    weight = torch.rand(loss.shape, generator=torch.Generator().manual_seed(99)) + 0.5
    grads = torch.autograd.grad(loss, floats.values(), weight.to(loss))
    return {"loss": loss} | {f"d{k}": g for k, g in zip(floats, grads, strict=True)}


def check_loss(inputs, room, context=torch.enable_grad, **options):
    """Loss and gradients against float64, under the bound of PyTorch's own two functions."""
    exact = {k: v if v is None or k == "labels" else v.double() for k, v in inputs.items()}
    truth = outcome(plain, exact, **options)
    with context():
        usual = outcome(plain, inputs, **options)
        got = outcome(linear_cross_entropy_fn, inputs, **options, backend=room)
    limits = bounds(usual, truth)
    rows = [Row(name, *errors(got[name], truth[name]), limits[name]) for name in truth]
    assert all(row.ok for row in rows), "\n".join(map(str, rows))
    kinds = [{k: (v.dtype, v.shape) for k, v in found.items()} for found in (got, usual)]
    assert kinds[0] == kinds[1]
