"""The two synthetic tasks of the paper, made in code: selective copying and induction heads.

Paper: section 4.1, appendix E.1. A seeded NumPy generator decides everything.
"""

import numpy as np
import torch


def selective_copying(rng, batch, seqlen=4096, n_tokens=16, vocab_size=16):
    """Remember n_tokens scattered among noise, and repeat them in order when asked.

    The first `seqlen` positions hold noise (id 0) and, at random positions, n_tokens data tokens (ids
    1 .. vocab_size - 2). Then the marker (id vocab_size - 1) stands n_tokens times; at the k-th one the
    target is the k-th data token. The paper's setting is the default: length 4096, 16 tokens to copy,
    vocabulary 16 with the noise (table 1).

    Returns inputs, targets (B, seqlen + n_tokens) int64 and mask, bool of the same shape: True where
    the target counts; elsewhere it is noise. Raises ValueError for impossible sizes. Costs
    O(B seqlen log seqlen) operations.
    """
    if not 0 < n_tokens <= seqlen:
        raise ValueError(f"n_tokens: got {n_tokens}; accepted: 1 to seqlen = {seqlen}")
    if vocab_size < 3:
        raise ValueError(
            f"vocab_size: got {vocab_size}; accepted: 3 or more (noise, a data token, the marker)"
        )
    data = rng.integers(1, vocab_size - 1, (batch, n_tokens))
    places = np.argsort(rng.random((batch, seqlen)), axis=1)[:, :n_tokens]  # n_tokens distinct positions
    inputs = np.zeros((batch, seqlen + n_tokens), np.int64)
    np.put_along_axis(inputs, np.sort(places, axis=1), data, axis=1)
    inputs[:, seqlen:] = vocab_size - 1
    targets = np.zeros_like(inputs)
    targets[:, seqlen:] = data
    mask = np.zeros(inputs.shape, bool)
    mask[:, seqlen:] = True
    return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(mask)


def induction_heads(rng, batch, seqlen=256, vocab_size=16, max_prefix=None):
    """Recall what followed the special token the first time, when it comes again.

    Random ordinary tokens (ids 0 .. vocab_size - 2), and the special token S (id vocab_size - 1) exactly
    twice: at a random position, followed by the token to remember, and at the very end, where that token
    is the target. `max_prefix` limits how many tokens stand before the first S; by default it may be
    anywhere. The paper trains at length 256 with vocabulary 16 (table 2).

    Returns inputs, targets (B, seqlen) int64 and mask, bool of the same shape: True at the last position
    alone; elsewhere the target is 0. Raises ValueError for impossible sizes.
    """
    if seqlen < 3:
        raise ValueError(f"seqlen: got {seqlen}; accepted: 3 or more (S, the token, S)")
    if vocab_size < 2:
        raise ValueError(f"vocab_size: got {vocab_size}; accepted: 2 or more (an ordinary token, S)")
    last_place = seqlen - 3 if max_prefix is None else max_prefix
    if not 0 <= last_place <= seqlen - 3:
        raise ValueError(f"max_prefix: got {max_prefix}; accepted: 0 to seqlen - 3 = {seqlen - 3}")
    inputs = rng.integers(0, vocab_size - 1, (batch, seqlen))
    first, rows = rng.integers(0, last_place + 1, batch), np.arange(batch)
    inputs[rows, first] = inputs[:, -1] = vocab_size - 1
    targets = np.zeros_like(inputs)
    targets[:, -1] = inputs[rows, first + 1]
    mask = np.zeros(inputs.shape, bool)
    mask[:, -1] = True
    return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(mask)
