"""Packed sequences, defined by the slow way: scan each one alone and put the results side by side.

A row that holds several sequences is marked either by ``seq_idx`` (B, L), where a change of value
starts a new sequence from the zero state, or by ``cu_seqlens`` (S + 1,) on a batch of one, where
sequence k holds tokens cu_seqlens[k] to cu_seqlens[k + 1].
"""

from itertools import pairwise

import numpy as np


def by_sequence(
    scan, xp, u, delta, A, B, C, D, z, delta_bias, delta_softplus,
    return_last_state, initial_state, seq_idx, cu_seqlens, return_states=False,
):  # fmt: skip
    """Apply `scan` to every packed sequence alone; `xp` is numpy or torch.

    With seq_idx, initial_state and last_state are (B, D, N): the state before the first and after
    the last token of each row. With cu_seqlens they are (S, D, N): one per sequence.
    """
    if cu_seqlens is not None:
        rows = [[(s, e, k) for k, (s, e) in enumerate(_spans(cu_seqlens.tolist()))]]
    else:
        rows = [[(s, e, b if s == 0 else None) for s, e in _runs(r.tolist())] for b, r in enumerate(seq_idx)]
    pairs = 2 if "complex" in str(A.dtype) else 1
    keep_states = {"return_states": True} if return_states else {}

    def cut(x, b, s, e, width=1):
        return x if x is None or x.ndim == 2 else x[b : b + 1, ..., s * width : e * width]

    results = []  # one list a row, one (y, last_state, ...) a sequence
    for b, pieces in enumerate(rows):
        results.append([
            scan(
                cut(u, b, s, e), cut(delta, b, s, e), A, cut(B, b, s, e, pairs), cut(C, b, s, e, pairs),
                D, cut(z, b, s, e), delta_bias, delta_softplus, True, **keep_states,
                initial_state=None if initial_state is None or k is None else initial_state[k : k + 1],
            )
            for s, e, k in pieces
        ])  # fmt: skip
    join = np.concatenate if xp is np else xp.cat
    out = [join([join([part[0] for part in row], -1) for row in results], 0)]
    if return_last_state:
        every = cu_seqlens is not None
        out.append(join([part[1] for row in results for part in (row if every else row[-1:])], 0))
    if return_states:
        out.append(join([join([part[2] for part in row], 2) for row in results], 0))
    return tuple(out) if len(out) > 1 else out[0]


def _spans(edges):
    return list(pairwise(edges))


def _runs(row):
    """Start and end of every run of equal values: [3, 3, 7] -> (0, 2), (2, 3)."""
    return _spans([0, *(i for i in range(1, len(row)) if row[i] != row[i - 1]), len(row)])
