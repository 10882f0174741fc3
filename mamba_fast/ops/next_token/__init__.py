"""The likeliest token of every row, put where the next step finds it. See README.md in this folder."""

from typing import NamedTuple

from torch import Tensor

from mamba_fast.ops import rooms
from mamba_fast.ops.next_token import torch_next

__all__ = ["Slots", "greedy_token", "record"]


class Slots(NamedTuple):
    """Where tokens go, all of it changed in place.

    token (B, 1) int64: the last one. tokens (T, B) int64: row place[b] gets the token of row b. place (B,)
    int64: moves on by one. eos (E,) int64: tokens that end a row; finished (B,) bool: the rows that have
    ended, whose tokens are eos[0] from then on. seen (B, V) bool, penalty () float32: what repetition
    costs, or None both.
    """

    token: Tensor
    tokens: Tensor
    place: Tensor
    eos: Tensor
    finished: Tensor
    seen: Tensor | None = None
    penalty: Tensor | None = None


def greedy_token(logits, slots, *, backend=None):
    """argmax_v of logits (B, V) after the penalty, the first of equals, recorded in `slots`.

    backend : None (Triton on a GPU, else PyTorch), "torch" or "triton"

    One launch on a GPU. Reads the logits once, and with a penalty one byte each beside them.
    """
    if rooms.choose("greedy_token", logits, (logits,), backend) == "torch":
        torch_next.greedy(logits, slots)
    else:
        from mamba_fast.ops.next_token import triton_next

        triton_next.greedy(logits, slots)


record = torch_next.record
