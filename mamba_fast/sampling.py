"""From the logits of one position to its token: what is left to choose from, and the choice.

Nothing here reads a value on the host, so that all of it can be part of a CUDA graph.
"""

import math
import numbers

import torch


def check_sampling(top_k, top_p, min_p, temperature, repetition_penalty):
    """ValueError or TypeError that names the first argument out of its range, or no number."""
    if not isinstance(top_k, numbers.Integral) or top_k < 0:
        raise ValueError(f"top_k: expected an integer of at least 0 (no limit; 1 is greedy), got {top_k!r}")
    rest = dict(top_p=top_p, min_p=min_p, temperature=temperature, repetition_penalty=repetition_penalty)
    for name, value in rest.items():
        if not isinstance(value, (numbers.Real, torch.Tensor)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    if top_k != 1 and not 0 < temperature < math.inf:  # the greedy token does not depend on it
        raise ValueError(f"temperature: expected a positive number (top_k=1 is greedy), got {temperature!r}")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty: expected a positive number, got {repetition_penalty!r}")


def filtered(logits, top_k=0, top_p=None, min_p=None, temperature=None):
    """What may be chosen: scores (B, K) in float32, -inf for what may not, and its tokens (B, K) or None.

    The filters in their order: the top_k highest logits (0: all); among them those of at least min_p times
    the probability of the highest; logits over the temperature; of the distribution that is left the
    fewest tokens, the likeliest first, that hold at least top_p. None leaves a filter out; numbers may be
    tensors. Tokens are None where column k is token k.
    """
    scores, tokens = logits.float(), None
    if top_k:
        scores, tokens = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
    elif top_p is not None:
        scores, tokens = scores.sort(dim=-1, descending=True, stable=True)
    if min_p is not None:
        floor = scores.amax(-1, keepdim=True) + torch.as_tensor(min_p, device=scores.device).log()
        scores = scores.masked_fill(scores < floor, -math.inf)
    if temperature is not None:
        scores = scores / temperature
    if top_p is not None:
        probability = scores.softmax(-1)
        likelier = probability.cumsum(-1, dtype=torch.float64) - probability  # 0 for the first: it stays
        scores = scores.masked_fill(likelier >= top_p, -math.inf)
    return scores, tokens


def draw(scores, uniform):
    """The column of each row of scores (B, K) at which the distribution function passes uniform (B,).

    uniform: float64 in [0, 1). The same number draws the same column on every device, up to roundings.
    """
    probability = scores.softmax(-1)
    reached = probability.cumsum(-1, dtype=torch.float64)
    columns = torch.arange(scores.shape[-1], device=scores.device)
    last = ((probability > 0) * columns).amax(-1)  # what rounding may not step over
    passed = reached <= uniform[:, None] * reached[..., -1:]
    return torch.minimum(passed.sum(-1), last)


def sample(logits, uniform=None, top_k=1, top_p=None, min_p=None, temperature=None):
    """One token for each row of logits (B, V): (B,).

    top_k = 1 is the highest logit, and needs no `uniform`; else see :func:`filtered` and :func:`draw`.
    """
    if top_k == 1:
        return logits.argmax(-1)
    scores, tokens = filtered(logits, top_k, top_p, min_p, temperature)
    column = draw(scores, uniform)
    return column if tokens is None else tokens.gather(-1, column[:, None])[:, 0]
