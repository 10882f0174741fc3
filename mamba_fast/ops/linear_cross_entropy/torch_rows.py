"""A chunk of logits in plain PyTorch: any device, any float type."""

import torch


def rows(logits, labels, losses, scale, vocab_size, ignore_index, keep):
    """Write `losses` (T,) of logits (T, V); if `keep`, the logits become scale (softmax - onehot).

    Columns from vocab_size on have no probability, rows with ignore_index no loss and no gradient. The loss
    of a label out of range is NaN.
    """
    p = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    live = labels != ignore_index
    valid = live & (labels >= 0) & (labels < vocab_size)
    target = torch.where(valid, labels, 0).long()[:, None]
    lse = p.logsumexp(1)
    at_label = p.gather(1, target)[:, 0].masked_fill(~valid, torch.nan)
    losses.copy_(torch.where(live, lse - at_label, 0))
    if not keep:
        return
    p = p.sub_(lse[:, None]).exp_()
    p.scatter_add_(1, target, -valid[:, None].to(p.dtype))
    if scale is not None:
        p *= scale[:, None].to(p.dtype)
    logits[:, :vocab_size] = p.masked_fill_(~live[:, None], 0)
    logits[:, vocab_size:] = 0
