"""The next token in plain PyTorch."""

import torch


def penalise(logits, seen, penalty):
    """Logits of tokens `seen` (B, V) divided by the penalty, those below 0 multiplied: new (B, V)."""
    lower = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, lower.to(logits.dtype), logits)


def greedy(logits, slots):
    """The likeliest token of each row, recorded."""
    if slots.seen is not None:
        logits = penalise(logits, slots.seen[:, : logits.shape[1]], slots.penalty)
    record(logits.argmax(-1), slots)


def record(token, slots, forced=None):
    """Put token (B,) into `slots`: eos[0] where a row has ended, `forced` (B,) where that is not negative."""
    if len(slots.eos):
        token = torch.where(slots.finished, slots.eos[0], token)
    if forced is not None:
        token = torch.where(forced < 0, token, forced)
    if len(slots.eos):
        slots.finished.logical_or_((token[:, None] == slots.eos).any(-1))
    if slots.seen is not None:
        slots.seen.scatter_(1, token[:, None], True)
    slots.token.copy_(token[:, None])
    slots.tokens.scatter_(0, slots.place[None], token[None])
    slots.place.add_(1)
