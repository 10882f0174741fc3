"""The two synthetic tasks of the paper, drawn on the device that trains: fresh rows at every step.

Paper: section 4.1, appendix E.1.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # a label that does not count


class Batch(NamedTuple):
    """What a step reads: input_ids (B, L); labels (B, L), the target at each token or -100; packing.

    seq_idx: (B, L), a change starts a document; None where each row is one. last: only the labels of the
    last so many tokens count; 0 for any.
    """

    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor | None = None
    last: int = 0


def induction_heads(batch, seqlen=256, vocab_size=16, max_prefix=None, *, generator=None, device=None):
    """Recall what followed the special token the first time, when it comes again: a :class:`Batch`.

    Ordinary tokens (ids 0 .. vocab_size - 2) and the special token S (id vocab_size - 1) exactly twice: at
    a random position, at most `max_prefix` if given, and at the very end, where the label is the token that
    followed the first S. No other label counts. Raises ValueError for impossible sizes.
    """
    if seqlen < 3:
        raise ValueError(f"seqlen: got {seqlen}; accepted: 3 or more (S, the token, S)")
    if vocab_size < 2:
        raise ValueError(f"vocab_size: got {vocab_size}; accepted: 2 or more (an ordinary token, S)")
    last_place = seqlen - 3 if max_prefix is None else max_prefix
    if not 0 <= last_place <= seqlen - 3:
        raise ValueError(f"max_prefix: got {max_prefix}; accepted: 0 to seqlen - 3 = {seqlen - 3}")
    at = {"generator": generator, "device": device}
    ids = torch.randint(vocab_size - 1, (batch, seqlen), **at)
    first = torch.randint(last_place + 1, (batch, 1), **at)
    t = torch.arange(seqlen, device=device)
    labels = ids.gather(1, first + 1).repeat(1, seqlen).masked_fill(t < seqlen - 1, IGNORED)
    return Batch(ids.masked_fill((t == first) | (t == seqlen - 1), vocab_size - 1), labels, last=1)


def selective_copying(batch, seqlen=4096, n_tokens=16, vocab_size=16, *, generator=None, device=None):
    """Remember n_tokens scattered among noise, and repeat them in order when asked: a :class:`Batch`.

    `seqlen` positions of noise (id 0) with n_tokens data tokens (ids 1 .. vocab_size - 2) at random places;
    then the marker (id vocab_size - 1) n_tokens times: the label at the k-th one is the k-th data token, no
    other counts. Rows have seqlen + n_tokens tokens. The defaults are the paper's (table 1). Raises
    ValueError for impossible sizes.
    """
    if not 0 < n_tokens <= seqlen:
        raise ValueError(f"n_tokens: got {n_tokens}; accepted: 1 to seqlen = {seqlen}")
    if vocab_size < 3:
        raise ValueError(
            f"vocab_size: got {vocab_size}; accepted: 3 or more (noise, a data token, the marker)"
        )
    at = {"generator": generator, "device": device}
    data = torch.randint(1, vocab_size - 1, (batch, n_tokens), **at)
    places = torch.rand(batch, seqlen, **at).topk(n_tokens, sorted=False).indices.sort(1).values
    t = torch.arange(seqlen, device=device).expand(batch, seqlen).contiguous()
    k = torch.searchsorted(places, t).clamp(max=n_tokens - 1)  # how many data tokens came before t
    scattered = data.gather(1, k).masked_fill(places.gather(1, k) != t, 0)
    ids = torch.cat([scattered, torch.full_like(data, vocab_size - 1)], 1)
    labels = torch.cat([torch.full_like(scattered, IGNORED), data], 1)
    return Batch(ids, labels, last=n_tokens)


class Generated:
    """Rows that a function draws: those of a position are the same whenever, and in whatever process.

    draw : (batch, generator=, device=) -> :class:`Batch`. The numbers depend on the kind of device: a CPU
    and a GPU draw different rows from one seed.
    """

    def __init__(self, draw, batch_size, vocab_size, seed, device):
        self.draw, self.batch_size, self.vocab_size, self.seed = draw, batch_size, vocab_size, seed
        self.digest = ""
        self.generator = torch.Generator(device)

    def seek(self, position):
        """Go to the row of that number, of all that will ever be drawn."""
        self._sow(self.generator, 0, position)

    def next(self):
        """The next `batch_size` rows."""
        return self.draw(self.batch_size, generator=self.generator, device=self.generator.device)

    def validation(self, batches):
        """Batches from another seed, the same ones at every call."""
        generator = torch.Generator(self.generator.device)
        for k in range(batches):
            self._sow(generator, 1, k)
            yield self.draw(self.batch_size, generator=generator, device=generator.device)

    def _sow(self, generator, split, position):
        words = np.random.SeedSequence([self.seed, split, position]).generate_state(1, np.uint64)
        generator.manual_seed(int(words[0]))


def induction_data(config, vocab_size=16, max_prefix=None):
    """Induction heads of config.seqlen tokens."""

    def draw(batch, **at):
        return induction_heads(batch, config.seqlen, vocab_size, max_prefix, **at)

    draw(0)  # sizes that cannot be are an error before anything starts
    return Generated(draw, config.batch_size, vocab_size, config.seed, config.device)


def copying_data(config, vocab_size=16, n_tokens=16):
    """Selective copying: config.seqlen tokens of noise and data, then n_tokens markers."""

    def draw(batch, **at):
        return selective_copying(batch, config.seqlen, n_tokens, vocab_size, **at)

    draw(0)
    return Generated(draw, config.batch_size, vocab_size, config.seed, config.device)
