"""How the tokens of a call lie in its rows: one sequence a row, packed, or padded.

A model works this out once and hands it to every layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


class Window(NamedTuple):
    """Where the last K inputs of every row of the states come from, each (rows, K).

    Input k is token `token` of the row where `live`, entry `past` of the old conv_state where `inherits`,
    and zero elsewhere.
    """

    token: Tensor
    live: Tensor
    past: Tensor
    inherits: Tensor


class Layout(NamedTuple):
    """What the convolution, the scan and the states need to know; `rows` of states, one a sequence kept."""

    rows: int
    conv_seq: Tensor | None = None  # (B, L) int32: a change starts a sequence, a negative value is padding
    scan_seq: Tensor | None = None  # (B, L) int32, without the padding
    cu_seqlens: Tensor | None = None  # (S + 1,)
    place: Tensor | None = None  # (L,) with cu_seqlens: how many tokens of its sequence precede a token
    pad: Tensor | None = None  # (B, 1, L) bool
    window: Window | None = None
    begins: bool = False  # padding stands only before a row's first token, where its states are zero

    @property
    def plain(self):
        return self.conv_seq is None

    def packing_of_scan(self, with_states):
        """seq_idx or cu_seqlens for the scan: edges only where each sequence has states of its own."""
        if self.cu_seqlens is None:
            return {"seq_idx": self.scan_seq}
        return {"cu_seqlens": self.cu_seqlens} if with_states else {"seq_idx": self.conv_seq}


def layout_of(hidden_states, width, seq_idx=None, cu_seqlens=None, attention_mask=None):
    """The :class:`Layout` of hidden_states (B, L, ...) for a convolution of K = `width` taps.

    Raises TypeError or ValueError that name the argument. Reads values only of a cu_seqlens on the CPU.
    """
    batch, seqlen = hidden_states.shape[:2]
    if seq_idx is None and cu_seqlens is None and attention_mask is None:
        return Layout(batch)
    if seqlen == 0:
        raise ValueError("seq_idx, cu_seqlens, attention_mask: need at least one token, got L = 0")
    if cu_seqlens is not None:
        for name, other in (("seq_idx", seq_idx), ("attention_mask", attention_mask)):
            if other is not None:
                raise ValueError(f"{name}: expected None beside cu_seqlens, which leaves no room for padding")
        return _by_edges(_edges(cu_seqlens, hidden_states), seqlen, width)
    if seq_idx is not None:
        _check("seq_idx", seq_idx, hidden_states, INTEGERS)
    if attention_mask is None:
        seq = _numbered(seq_idx)
        return Layout(batch, seq, seq, window=_last_of_rows(torch.ones_like(seq), seq, width))
    _check("attention_mask", attention_mask, hidden_states, (torch.bool, *INTEGERS))
    real = attention_mask != 0
    seq = real.new_zeros(real.shape, dtype=torch.int32)
    if seq_idx is not None:
        seq = _numbered(seq_idx.gather(1, _nearest_real(real)))
    conv_seq = torch.where(real, seq, -1)
    scan_seq = None if seq_idx is None else seq
    window = _last_of_rows(real, _numbered(conv_seq), width)
    return Layout(batch, conv_seq, scan_seq, pad=~real[:, None], window=window)


def left_padded(attention_mask):
    """The :class:`Layout` of rows whose padding, 0 in attention_mask (B, L), comes before all their tokens.

    Their states have to be zero there. Nothing needs to pass through padding then: the convolution gives
    u = 0, so that the scan's state stays zero whatever Δ is.
    """
    real = attention_mask != 0
    seq = torch.where(real, 0, -1).to(torch.int32)
    return Layout(len(real), seq, pad=~real[:, None], begins=True)


def _by_edges(edges, seqlen, width):
    """One row that holds sequence k in tokens edges[k] to edges[k + 1]."""
    first, end = edges[:-1, None], edges[1:, None]
    tokens = torch.arange(seqlen, device=edges.device)
    seq = torch.searchsorted(edges[1:], tokens, right=True).clamp_(max=len(first) - 1)
    token = end - width + torch.arange(width, device=edges.device)  # (S, K)
    live = token >= first
    window = Window(token.clamp(min=0), live, (token - first + width).clamp(0, width - 1), ~live)
    place = tokens - edges[:-1][seq]
    return Layout(len(first), seq.to(torch.int32)[None], None, edges, place, None, window)


def _last_of_rows(real, run, width):
    """The window of each row: the end of its last run of real tokens, as the convolution would see it."""
    tokens = torch.arange(1, run.shape[1] + 1, device=run.device)
    end = torch.where(real != 0, tokens, 0).amax(1, keepdim=True)  # (B, 1): behind the last real token
    token = end - width + torch.arange(width, device=run.device)  # (B, K)
    there = token.clamp(min=0)
    last = run.gather(1, (end - 1).clamp(min=0))
    live = (token >= 0) & (run.gather(1, there) == last)
    inherits = (token < 0) & (last == run[:, :1])
    return Window(there, live, (token + width).clamp(0, width - 1), inherits)


def _numbered(seq_idx):
    """Any integers as 0, 1, 2 ... along the row, (B, L) int32: a change of value is the next number."""
    change = torch.zeros_like(seq_idx, dtype=torch.int32, memory_format=torch.contiguous_format)
    change[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return change.cumsum(1, dtype=torch.int32)


def _nearest_real(real):
    """(B, L): the last real token up to here; before the first one, that one."""
    tokens = torch.arange(real.shape[1], device=real.device)
    first = real.to(torch.int32).argmax(1, keepdim=True)
    return torch.where(real, tokens, first).cummax(1).values


def _edges(cu_seqlens, hidden_states):
    """cu_seqlens as int64 beside the tokens, its values checked if it lives on the CPU."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in INTEGERS:
        raise ValueError(
            "cu_seqlens: expected int32 or int64 of shape (S + 1,), S >= 1, "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    batch, seqlen = hidden_states.shape[:2]
    if batch != 1:
        raise ValueError(f"cu_seqlens: needs a batch of 1 that holds every sequence, got a batch of {batch}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        edges = cu_seqlens.tolist()
        if edges[0] != 0 or edges[-1] != seqlen or edges != sorted(edges):
            raise ValueError(f"cu_seqlens: expected to rise from 0 to L = {seqlen}, got {edges}")
    return cu_seqlens.to(hidden_states.device, torch.int64)


def _check(name, value, hidden_states, dtypes):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected {accepted}, got {str(value.dtype).removeprefix('torch.')}")
    if value.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name}: expected (B, L) = {tuple(hidden_states.shape[:2])}, got {tuple(value.shape)}"
        )
    if value.device != hidden_states.device:
        raise ValueError(f"{name}: expected device {hidden_states.device}, got {value.device}")
