"""The loss of a language model: every token is predicted from those before it (section 4.2)."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mamba_fast.ops.linear_cross_entropy import linear_cross_entropy_fn


def next_tokens(input_ids, labels, layout, ignore_index):
    """(B, L): at each token the label of the next one; ignore_index where none of its sequence follows.

    Padding neither predicts nor is predicted. labels: None for those of the tokens themselves. `layout` is
    the :class:`Layout` of the tokens. ValueError if labels have another shape.
    """
    labels = input_ids if labels is None else labels
    if labels.shape != input_ids.shape:
        shapes = tuple(input_ids.shape), tuple(labels.shape)
        raise ValueError("labels: expected (B, L) = {}, got {}".format(*shapes))
    none = torch.full_like(labels[:, :1], ignore_index)
    following = torch.cat([labels[:, 1:], none], 1)
    if layout.plain:
        return following
    seq = layout.conv_seq
    together = (seq[:, 1:] == seq[:, :-1]) & (seq[:, 1:] >= 0)
    return following.masked_fill(~torch.cat([together, torch.zeros_like(together[:, :1])], 1), ignore_index)


def head_loss(lm_head, hidden_states, labels, ignore_index, room, reduction="mean"):
    """Cross-entropy of lm_head's logits, which a plain Linear never holds at once: its mean, or its sum."""
    how = {"ignore_index": ignore_index, "reduction": reduction}
    if type(lm_head) is not nn.Linear:  # one that a library has put in its place
        return cross_entropy(lm_head(hidden_states).flatten(0, 1), labels.flatten(), **how)
    return linear_cross_entropy_fn(
        hidden_states, lm_head.weight, labels, bias=lm_head.bias, backend=room, **how
    )
