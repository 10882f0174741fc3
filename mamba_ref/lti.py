"""A linear time-invariant SSM, h_t = A_bar h_{t-1} + B_bar u_t, y_t = C h_t, in its three forms.

Paper: Section 2, equations 2 (recurrence) and 3 (convolution). The third form is the L x L matrix.

A_bar, B_bar and C are the entries of a diagonal system: (N,) for one channel, or (D, N) for D of
them. u is then (L,), or (B, D, L); any leading axes broadcast. Complex modes are given with their
conjugates, so that the sum over N is real, and y is its real part.
"""

import numpy as np


def recurrence(A_bar, B_bar, C, u, *, initial_state=None, return_states=False):
    """Equation 2, a loop over time: h_t = A_bar h_{t-1} + B_bar u_t, y_t = sum_n C_n h_{t,n}.

    A_bar, B_bar, C: (N,) or (D, N). u: (L,) or (B, D, L). initial_state: (N,) or (B, D, N), default
    zeros. Returns y, of u's shape, and with `return_states` also h, (L, N) or (B, D, L, N).
    ValueError when an array does not fit. Costs 4 B D L N operations and B D N numbers of memory.
    """
    A_bar, B_bar, C, u = _for_input(A_bar, B_bar, C, u)
    kind = np.result_type(A_bar, B_bar, u)
    h = np.zeros((*u.shape[:-1], A_bar.shape[-1]), kind)
    if initial_state is not None:
        h = h + initial_state
    y, states = [], []
    for t in range(u.shape[-1]):
        h = A_bar * h + B_bar * u[..., t, None]  # (..., N)
        states.append(h)
        y.append((C * h).sum(-1).real)
    y = np.stack(y, axis=-1) if y else np.zeros(u.shape)
    if not return_states:
        return y
    return y, (np.stack(states, axis=-2) if states else np.zeros((*u.shape, A_bar.shape[-1]), kind))


def kernel(A_bar, B_bar, C, seqlen):
    """Equation 3a, the response to 1, 0, 0, ...: K_t = sum_n C_n A_bar_n^t B_bar_n for t = 0 .. L - 1.

    A_bar, B_bar, C: (N,) or (D, N). Returns K, (L,) or (D, L), real. Costs D L N powers and
    2 D L N operations, all of them independent of one another.
    """
    A_bar, B_bar, C = _modes(A_bar, B_bar, C)
    powers = A_bar[..., None] ** np.arange(seqlen)  # (..., N, L)
    return ((C * B_bar)[..., None] * powers).sum(-2).real


def convolution(K, u, method="direct"):
    """Equation 3b: y_t = sum_{s <= t} K_{t-s} u_s, added lag by lag or through the FFT.

    K: (L,) or (D, L). u: (L,) or (B, D, L). Returns y, of u's shape. "direct" costs B D L^2
    operations. "fft" costs about 15 B D L log2(2L); both sequences are padded with L zeros,
    because a product of two L-point transforms would wrap the end of y around onto its beginning.
    """
    K, u = np.asarray(K), np.asarray(u)
    seqlen = u.shape[-1]
    if K.shape[-1:] != u.shape[-1:]:
        raise ValueError(f"K: got {K.shape[-1]} taps for u of length {seqlen}; accepted is one a token")
    if method == "fft":
        size = max(1, 2 * seqlen)
        return np.fft.irfft(np.fft.rfft(K, size) * np.fft.rfft(u, size), size)[..., :seqlen]
    if method != "direct":
        raise ValueError(f"method: got {method!r}; accepted are 'direct' and 'fft'")
    y = np.zeros(np.broadcast_shapes(K.shape, u.shape))
    for lag in range(seqlen):
        y[..., lag:] += K[..., lag, None] * u[..., : seqlen - lag]
    return y


def matrix(K):
    """The map from u to y as a lower-triangular Toeplitz matrix: M[t, s] = K_{t-s} for s <= t, else 0.

    K: (L,) or (D, L). Returns M, (L, L) or (D, L, L); y = M u costs L^2 operations and 8 L^2 bytes.
    """
    K = np.asarray(K)
    lag = np.arange(K.shape[-1])[:, None] - np.arange(K.shape[-1])  # (L, L): t - s
    return np.where(lag >= 0, K[..., np.maximum(lag, 0)], 0.0)


def rounding(A_bar, B_bar, C, u):
    """A bound on ||y' - y|| / ||y|| for two float64 evaluations of y, in any of the forms here but the FFT.

    y_t is a sum over s and n of C_n A_bar_n^(t-s) B_bar_n u_s. A term meets at most L roundings in
    its power, L + N in additions and 4 more, each of at most 3 eps / 2 (complex products included).
    So an evaluation errs by at most (2L + N + 4) 3 eps / 2 times the same sum over absolute values,
    which one more recurrence computes; two evaluations differ by at most twice that.
    """
    A_bar, B_bar, C, u = _for_input(A_bar, B_bar, C, u)
    terms = recurrence(*(np.abs(x) for x in (A_bar, B_bar, C, u)))
    roundings = 2 * (2 * u.shape[-1] + A_bar.shape[-1] + 4) * 1.5 * np.finfo(float).eps
    return roundings * np.linalg.norm(terms) / np.linalg.norm(recurrence(A_bar, B_bar, C, u))


def _modes(A_bar, B_bar, C):
    """The three as arrays; ValueError names the one whose last axis is not the N of A_bar."""
    A_bar, B_bar, C = (np.asarray(x) for x in (A_bar, B_bar, C))
    for name, x in (("A_bar", A_bar), ("B_bar", B_bar), ("C", C)):
        if x.ndim == 0 or x.shape[-1] != A_bar.shape[-1]:
            raise ValueError(f"{name}: got shape {x.shape}; accepted is (N,) or (D, N), one N for all")
    return A_bar, B_bar, C


def _for_input(A_bar, B_bar, C, u):
    """The three and u as arrays; ValueError names u when the channels of the system are not its own."""
    A_bar, B_bar, C = _modes(A_bar, B_bar, C)
    u = np.asarray(u)
    for x in (A_bar, B_bar, C):
        if u.ndim == 0 or (x.ndim > 1 and x.shape[:-1] != u.shape[-x.ndim : -1]):
            raise ValueError(f"u: got shape {u.shape} beside a system {x.shape}; accepted is (..., D, L)")
    return A_bar, B_bar, C, u
