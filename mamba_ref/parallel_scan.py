"""One associative operator and four orders of applying it: the recurrence without its long chain.

The recurrence h_t = a_t h_{t-1} + b_t is a prefix "sum" of the pairs (a_t, b_t) under

    (a_1, b_1) then (a_2, b_2)  =  (a_1 a_2,  a_2 b_1 + b_2),

which is associative, so the pairs may be joined in any grouping (paper, section 3.3.2, after
Blelloch 1990). It is not commutative: earlier must stay on the left.

Every algorithm here is written on :class:`Segments`, which notes each application of the operator
while it runs. Work and depth are read off those notes; the formulas below are what they should be.
"""

from dataclasses import dataclass, field
from functools import partial
from math import isqrt

import numpy as np

from mamba_ref.packing import by_sequence
from mamba_ref.selective_scan import _per_channel_numpy

IDENTITY = (1.0, 0.0)  # keep everything, add nothing: what a token with delta = 0 does


def combine(first, second):
    """The pair that does what `first` and then `second` do: (a_1 a_2, a_2 b_1 + b_2).

    Each pair holds two arrays (or numbers) of one shape. Costs two multiplications and one
    multiply-add per element.
    """
    (a_1, b_1), (a_2, b_2) = first, second
    return a_1 * a_2, a_2 * b_1 + b_2


@dataclass(frozen=True)
class Counts:
    """What one scan of one channel and state cost.

    work: operator applications. depth: the longest chain of applications of which each needs the
    one before. trace: (work, 4) integers, one row an application: it joined tokens
    start..middle-1 with tokens middle..stop-1 as link number `depth` of its chain.
    """

    work: int
    depth: int
    trace: np.ndarray = field(repr=False)


class Segments:
    """L pairs (a, b), each standing for a run of tokens: at first, token t alone.

    `join(left, right)` is the only way to change them. It notes every application of the operator,
    and it refuses to join runs that are not neighbours, so a wrong order cannot go unseen.
    """

    def __init__(self, a, b):
        self.a, self.b = np.array(a), np.array(b)  # copies: (..., L)
        self.seqlen = self.a.shape[-1]
        self.start = np.arange(self.seqlen)
        self.stop = self.start + 1
        self.depth = np.zeros(self.seqlen, int)
        self.notes = []

    def join(self, left, right):
        """Replace pair `right` by `left` then `right`, for index arrays or slices of equal length.

        All the joins of one call read the old values, as if they ran at the same moment.
        """
        if (self.stop[left] != self.start[right]).any():
            raise ValueError("left, right: not neighbours, and the operator is not commutative")
        joined = combine(*((self.a[..., i], self.b[..., i]) for i in (left, right)))
        depth = np.maximum(self.depth[left], self.depth[right]) + 1
        self.notes.append(np.stack([self.start[left], self.start[right], self.stop[right], depth], axis=1))
        self.a[..., right], self.b[..., right] = joined
        self.start[right], self.depth[right] = self.start[left], depth

    def result(self):
        """h (..., L) and the :class:`Counts`, once every run begins at token 0."""
        if self.start.any():
            raise ValueError("segments: the scan is not finished, some runs do not begin at token 0")
        trace = np.concatenate([np.empty((0, 4), int), *self.notes])
        return self.b, Counts(len(trace), int(trace[:, 3].max(initial=0)), trace)


def sequential(a, b):
    """One token after another: h_t = a_t h_{t-1} + b_t with h_0 = b_0.

    a, b: (..., L) of one shape, any float or complex type. Returns h (..., L) and the counts:
    work L - 1, depth L - 1.
    """
    segments = _segments(a, b)
    for t in range(1, segments.seqlen):
        segments.join([t - 1], [t])
    return segments.result()


def hillis_steele(a, b):
    """Every token joins the run that ends 1, then 2, then 4 ... tokens before it (Hillis, Steele 1986).

    a, b: (..., L). Returns h (..., L) and the counts. With m = ceil(log2 L) rounds:
    work m L - (2^m - 1), depth m. The shortest chain, and the most work.
    """
    segments = _segments(a, b)
    step = 1
    while step < segments.seqlen:
        right = np.arange(step, segments.seqlen)
        segments.join(right - step, right)
        step *= 2
    return segments.result()


def blelloch(a, b):
    """Up a tree to totals of 2, 4, 8 ... tokens, then down again to every prefix (Blelloch 1990).

    The in-place inclusive form: any length, no padding. (The textbook's exclusive form runs over
    the same tree from an identity at its root.) a, b: (..., L). Returns h (..., L) and the counts.
    With m = floor(log2 L): work 2 L - 1 - m - (the number of ones in L, written in binary), so
    below 2 L; depth at most 2 m, and exactly 2 m - 2 for L = 2^m with m > 1.
    """
    segments = _segments(a, b)
    steps = [2**k for k in range(max(segments.seqlen, 1).bit_length())]
    for step in steps:
        right = np.arange(2 * step - 1, segments.seqlen, 2 * step)
        segments.join(right - step, right)
    for step in reversed(steps):
        right = np.arange(3 * step - 1, segments.seqlen, 2 * step)
        segments.join(right - step, right)
    return segments.result()


def chunked(a, b, chunk=None):
    """Loops over all chunks at once, a loop over the chunks' totals, and one join that hands them on.

    This is how kernels do it: short loops stay in registers, and few values cross between chunks.
    a, b: (..., L); chunk: tokens a chunk, by default about sqrt(L). Returns h (..., L) and the
    counts. With c = min(chunk, L) and n = ceil(L / c): work 2 L - c - n, depth c + n - 2.
    Raises ValueError unless chunk is at least 1.
    """
    segments = _segments(a, b)
    seqlen = segments.seqlen
    chunk = max(isqrt(max(seqlen - 1, 0)) + 1, 1) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, a chunk needs at least 1 token")
    for offset in range(1, min(chunk, seqlen)):
        right = np.arange(offset, seqlen, chunk)
        segments.join(right - 1, right)
    last = np.minimum(np.arange(chunk, seqlen + chunk, chunk), seqlen) - 1  # of each chunk
    for k in range(1, len(last)):
        segments.join(last[k - 1 : k], last[k : k + 1])
    rest = np.setdiff1d(np.arange(chunk, seqlen), last)
    segments.join(rest // chunk * chunk - 1, rest)
    return segments.result()


ALGORITHMS = {f.__name__: f for f in (sequential, hillis_steele, blelloch, chunked)}


def selective_scan_parallel(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
    return_last_state=False, *, initial_state=None, seq_idx=None, cu_seqlens=None,
    algorithm=blelloch,
):  # fmt: skip
    """The selective scan with the order of work as an argument: a_t = exp(delta_t A), b_t = delta_t B_t u_t.

    Arguments, shapes and results as in :func:`mamba_ref.selective_scan.selective_scan_numpy`
    (float64); `algorithm` is any function (a, b) -> (h, counts) over the last axis. All states are
    in memory at once: 16 B D L N bytes for a and b, and 3 operations an application of the operator.
    """
    if seq_idx is not None or cu_seqlens is not None:
        scan = partial(selective_scan_parallel, algorithm=algorithm)
        return by_sequence(scan, np, u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                           return_last_state, initial_state, seq_idx, cu_seqlens)  # fmt: skip
    u, delta = np.asarray(u, np.float64), np.asarray(delta, np.float64)
    A = np.asarray(A, np.complex128 if np.iscomplexobj(A) else np.float64)
    B, C = (_per_channel_numpy(x, A.dtype, u.shape[1]) for x in (B, C))  # (B or 1, D, N, L or 1)
    if delta_bias is not None:
        delta = delta + np.asarray(delta_bias, np.float64)[:, None]
    if delta_softplus:
        delta = np.where(delta > 20, delta, np.log1p(np.exp(np.minimum(delta, 20))))
    a = np.exp(delta[:, :, None] * A[..., None])  # (B, D, N, L)
    b = (delta * u)[:, :, None] * B  # (B, D, N, L)
    h_0 = np.zeros(a.shape[:-1], A.dtype) if initial_state is None else np.asarray(initial_state, A.dtype)
    b[..., :1] += a[..., :1] * h_0[..., None]
    h, _ = algorithm(a, b)
    y = (C * h).sum(2).real * (2 if np.iscomplexobj(A) else 1)  # (B, D, L)
    if D is not None:
        y = y + np.asarray(D, np.float64)[:, None] * u
    if z is not None:
        z = np.asarray(z, np.float64)
        y = y * z / (1 + np.exp(-z))
    return (y, h[..., -1] if h.shape[-1] else h_0) if return_last_state else y


def _segments(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim == 0:
        raise ValueError(f"a, b: got shapes {a.shape} and {b.shape}, need one shape (..., L)")
    dtype = np.result_type(a, b)
    return Segments(a.astype(dtype), b.astype(dtype))
