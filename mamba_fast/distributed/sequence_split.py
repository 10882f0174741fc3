"""Rows of tokens cut into slices, one a process: what has to pass from slice to slice, and back.

A layer needs two things of the tokens before its slice: the last K - 1 inputs of the convolution, and the
state of the scan. Every process hands its own to all others at once, so that nobody waits for a chain:

    local_s  = the state after slice s, from zero                              (B, D, N)
    total_s  = the sum of Δ over slice s                                       (B, D)
    h_0 of r = sum over s < r of exp(A (total_{s+1} + ... + total_{r-1})) local_s
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mamba_fast.distributed.slice_scan import SliceScan, gather
from mamba_fast.ops.selective_scan import backends
from mamba_fast.ops.selective_scan.arguments import normalise


class SequenceSplit:
    """Rows of L = `seqlen` tokens over the P processes of `group`: rank r holds a slice of every row.

    ``model(split.part(ids), sequence_split=split)`` gives this rank's part of what ``model(ids)`` gives on
    one process, for a :class:`Mamba` or a :class:`MambaLMHeadModel`. The same call with
    ``initial_states`` starts the rows from these states, wanted on every rank alike; with
    ``return_final_states`` each rank gets the states behind its own slice, the last rank those of the rows.

    Parameters
    ----------
    seqlen : tokens of a whole row, at least P; slices differ by one token at most
    group : a process group of torch.distributed, the default group if None; its ranks are the order of the
        slices
    seq_idx : (B, L) integers of whole rows, several sequences in each: a change of value starts a new one.
        The call then also takes ``seq_idx=split.seq_idx``.

    Attributes
    ----------
    rank, ranks : this process and how many there are, in `group`
    edges : rank r holds tokens edges[r] to edges[r + 1]
    seq_idx : this rank's part, or None
    weight : P times this rank's share of the tokens. The mean over ranks of weight · (mean loss of a
        slice) is the mean loss of the rows, as DDP and FSDP take the mean of gradients.

    Raises
    ------
    ValueError : names the argument, what came and what is accepted

    Notes
    -----
    Every rank makes the same calls in the same order, forward and backward. A rank whose tokens have no
    loss calls backward on zero times its output.

    Per layer a rank sends B D (K - 1) inputs, in their type, and B D (N + 1) float32 numbers to all others;
    in the backward the gradients of the former and B D N. It receives P times as much. Beside its scans it
    finds what its slice hands on, each way at about half the price of a forward scan.
    """

    def __init__(self, seqlen, group=None, seq_idx=None):
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not in it")
        if seqlen < self.ranks:
            raise ValueError(f"seqlen: expected a token for each of {self.ranks} ranks, got {seqlen}")
        self.seqlen = seqlen
        self.edges = [seqlen * r // self.ranks for r in range(self.ranks + 1)]
        first, end = self.edges[self.rank : self.rank + 2]
        self.weight = self.ranks * (end - first) / seqlen
        self.seq_idx = self._number = self.arrives_left = self.arrives_right = None
        if seq_idx is not None:
            self._pack(seq_idx)

    def _pack(self, seq_idx):
        """Where sequences end: what passes from slice to slice, and which tokens hand something on."""
        if seq_idx.dim() != 2 or seq_idx.shape[1] != self.seqlen:
            raise ValueError(f"seq_idx: expected (B, {self.seqlen}), got {tuple(seq_idx.shape)}")
        self.seq_idx = self.part(seq_idx)
        number = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1), (1, 0))  # changes before a token
        first = number[:, self.edges[:-1]].T  # (P, B): of the first token of each slice
        last = number[:, [end - 1 for end in self.edges[1:]]].T
        self.arrives_left = self.before(last) == first[self.rank]
        self.arrives_right = self.after(first) == last[self.rank]
        self._number, self._first, self._last = number, first[self.rank], last[self.rank]

    def part(self, tokens):
        """This rank's slice of (B, L, ...): a view (B, edges[rank + 1] - edges[rank], ...)."""
        if tokens.shape[1] != self.seqlen:
            raise ValueError(f"tokens: expected (B, {self.seqlen}, ...), got {tuple(tokens.shape)}")
        return tokens[:, self.edges[self.rank] : self.edges[self.rank + 1]]

    def before(self, everyone):
        """Of (P, ...) what belongs to the slices before this one, the farthest first."""
        return everyone[: self.rank]

    def after(self, everyone):
        return everyone[self.rank + 1 :].flip(0)

    def inputs_before(self, x, conv_state, layout, width):
        """conv_state (B, D, K) of the tokens before x (B, D, L/P); `conv_state` is that of whole rows."""
        self._check(x, layout)
        reach = width - 1
        past = x.new_zeros(*x.shape[:2], width) if conv_state is None else conv_state.to(x.dtype)
        past = past[..., 1:] * (self.rank == 0)  # every rank has one graph, or a backward would wait for ever
        own = torch.cat([past, x], -1)[..., -reach:]
        everyone = _Gather.apply(own, self.group)  # (P, B, D, K - 1)
        pieces, found = [], 0
        for s in reversed(range(self.rank)):
            if found >= reach:
                break
            held = reach if s == 0 else min(self.edges[s + 1] - self.edges[s], reach)
            pieces.insert(0, everyone[s][..., reach - held :])
            found += held
        nothing = everyone[:0].sum(0)  # rank 0 takes nothing, and its backward takes part
        before = torch.cat([past + nothing, *pieces], -1)[..., -reach:]
        if self._number is not None:
            first = self.edges[self.rank]
            number = F.pad(self._number[:, max(first - reach, 0) : first], (max(reach - first, 0), 0))
            same = number == self._number[:, first : first + 1]
            before = torch.where(same[:, None], before, 0)
        return F.pad(before, (1, 0))

    def scan(
        self, u, delta, A, B, C, D, *, z, delta_bias, delta_softplus, return_last_state, initial_state,
        seq_idx=None, backend=None,
    ):  # fmt: skip
        """:func:`selective_scan_fn` of this rank's slice, from the state behind the slices before it.

        `initial_state` is that of whole rows. Softplus is taken.
        """
        args = normalise(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, None)
        choice = backends.choose(u, A, backend)
        backends.warn_once_if_missing(choice)
        y, last_state = SliceScan.apply(*args[:10], choice.name, self)
        return (y, last_state) if return_last_state else y

    def in_last_sequence(self, x):
        """x (B, D, L / P) where it is of the slice's last sequence, 0 elsewhere."""
        return x if self._number is None else torch.where(self._is(self._last), x, 0)

    def in_first_sequence(self, x):
        return x if self._number is None else torch.where(self._is(self._first), x, 0)

    def _is(self, number):
        return (self.part(self._number) == number[:, None])[:, None]

    def through(self, A, total, state):
        """What is left of a state (B, D, N) on the other side of this slice."""
        state = torch.exp(A * total[..., None]) * state
        if self._number is None:
            return state
        return torch.where((self._first == self._last)[:, None, None], state, 0)

    def _check(self, x, layout):
        first, end = self.edges[self.rank : self.rank + 2]
        if x.shape[2] != end - first:
            raise ValueError(
                f"hidden_states: rank {self.rank} of {self.ranks} holds {end - first} of {self.seqlen} "
                f"tokens, got {x.shape[2]}"
            )
        if layout.pad is not None or layout.cu_seqlens is not None:
            raise ValueError(
                "attention_mask, cu_seqlens: expected None beside sequence_split; it takes seq_idx"
            )
        if layout.plain != (self._number is None):
            raise ValueError(
                "seq_idx: expected that of whole rows at SequenceSplit(seqlen, group, seq_idx), and its "
                "attribute seq_idx at the call"
            )


class _Gather(torch.autograd.Function):
    """Everybody's tensor, (P, ...). Backward is the transpose: to each what all have for it, summed."""

    @staticmethod
    def forward(ctx, own, group):
        ctx.group = group
        return gather(own, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        own = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter(own, list(grad.contiguous().unbind()), group=ctx.group)
        return own, None
