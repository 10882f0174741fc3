"""Every gradient of the selective scan by hand, in NumPy float64, from saved and from recomputed states.

The forward pass, with A_bar_t = exp(delta_t A) and the gate s_t = SiLU(z_t):

    h_t = A_bar_t h_{t-1} + delta_t B_t u_t        p_t = C_t h_t + D u_t        y_t = p_t s_t

Let g_t be the gradient of the loss with respect to h_t. The state h_t is used twice: by p_t, and by
h_{t+1} through A_bar_{t+1}. With dp_t = dy_t s_t the two uses add up to a second recurrence, which
runs from the last token to the first (without a gate dp_t is dy_t itself):

    g_t = C_t dp_t + A_bar_{t+1} g_{t+1},          and g_L = C_L dp_L + dlast_state.

Everything else is local in time, one product rule for each place where a letter stands:

    dC_t     = dp_t h_t                            dB_t = g_t delta_t u_t
    du_t     = D dp_t + delta_t sum_n(g_t B_t)     dD   = sum dp_t u_t
    ddelta_t = u_t sum_n(g_t B_t) + sum_n(g_t A A_bar_t h_{t-1})
    dA       = sum g_t delta_t A_bar_t h_{t-1}     dz_t = dy_t p_t SiLU'(z_t)
    dinitial_state = A_bar_1 g_1

The sums run over whatever the letter is shared by: dB and dC over the channels of a group, dA and dD
over batch and time. A softplus multiplies ddelta_t by its slope. The gradients need h_{t-1} and h_t at
every t, in reverse order, and that is the whole question of memory: keep them, or compute them again.

Packed sequences need nothing new, since no gradient crosses a border: walk each one back alone.
"""

from dataclasses import dataclass

import numpy as np

from mamba_ref.selective_scan import selective_scan_numpy


@dataclass(frozen=True)
class StateBytes:
    """Bytes of state: `saved` lives from the forward to the backward pass, `working` in the latter alone."""

    saved: int
    working: int

    @property
    def peak(self):
        return self.saved + self.working


def state_bytes(batch, d_inner, seqlen, d_state, chunk=None, itemsize=8):
    """The bytes of state each form needs: all of them (chunk None), or those at the chunk boundaries.

    All states: B D L N numbers saved, nothing recomputed. With chunks of length c: B D ceil(L / c) N
    numbers saved and B D min(c, L) N alive while one chunk is walked back. The peak is smallest
    near c = sqrt(L). Inputs and gradients are the same in both forms and not counted.
    """
    one = batch * d_inner * d_state * itemsize
    if chunk is None:
        return StateBytes(saved=one * seqlen, working=0)
    return StateBytes(saved=one * -(-seqlen // chunk), working=one * min(chunk, seqlen))


def backward_from_states(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
    *, dy, states, initial_state=None, dlast_state=None,
):  # fmt: skip
    """All gradients by g_t = C_t dy_t + A_bar_{t+1} g_{t+1}, reading every state h_t from `states`.

    Arguments as in :func:`mamba_ref.selective_scan_numpy`, with a real A. dy: (B, D, L), the gradient
    of the loss with respect to y. states: (B, D, L, N), from ``return_states=True``. dlast_state:
    (B, D, N), the gradient with respect to the last state, zero when not given.

    Returns a dict of float64 arrays: du, ddelta, dA, dB, dC, dinitial_state, and dD, dz, ddelta_bias
    where D, z, delta_bias are given; each has the shape of its argument. Raises TypeError for a
    complex A and ValueError for a wrong shape of dy, states or dlast_state. Costs about 20 B D L N
    operations and reads 8 B D L N bytes of states.
    """
    walk = _ReverseWalk(u, delta, A, B, C, D, z, delta_bias, delta_softplus, dy, dlast_state)
    _expect("states", states, (*walk.u.shape, walk.A.shape[1]))
    walk.back(
        0, np.asarray(states), walk.zero_state() if initial_state is None else np.asarray(initial_state)
    )
    return walk.gradients()


def backward_recompute(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
    *, dy, boundaries, chunk, dlast_state=None,
):  # fmt: skip
    """The same gradients from the states at chunk boundaries, running each chunk forward once more.

    boundaries: (B, D, ceil(L / chunk), N), the state that enters each chunk, as
    :func:`scan_keeping_boundaries` returns it; the first one is the initial state. Everything else,
    and what is returned and raised, as in :func:`backward_from_states`. Costs 6 B D L N operations
    more than that one; :func:`state_bytes` says what it saves.
    """
    walk = _ReverseWalk(u, delta, A, B, C, D, z, delta_bias, delta_softplus, dy, dlast_state)
    spans = _chunks(walk.u.shape[2], chunk)
    _expect("boundaries", boundaries, (*walk.u.shape[:2], len(spans), walk.A.shape[1]))
    for k, span in reversed(list(enumerate(spans))):
        u_k, delta_k, B_k, C_k = (_cut(x, span) for x in (u, delta, B, C))
        enters = np.asarray(boundaries)[:, :, k]
        _, states = selective_scan_numpy(u_k, delta_k, A, B_k, C_k, None, None, delta_bias, delta_softplus,
                                         return_states=True, initial_state=enters)  # fmt: skip
        walk.back(span.start, states, enters)
        del states  # the next chunk's are not made beside them
    return walk.gradients()


def scan_keeping_boundaries(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
    *, chunk, initial_state=None,
):  # fmt: skip
    """The forward pass in chunks: h_t = A_bar_t h_{t-1} + delta_t B_t u_t, keeping one state a chunk.

    Arguments as in :func:`mamba_ref.selective_scan_numpy`, with a real A. Returns y (B, D, L), last_state
    (B, D, N) and boundaries (B, D, ceil(L / chunk), N), the state before each chunk's first token. Raises
    TypeError for a complex A and ValueError for a chunk below 1. Same operations as the plain scan;
    8 B D ceil(L / chunk) N bytes kept.
    """
    u, A = np.asarray(u, np.float64), _real(A)
    spans = _chunks(u.shape[2], chunk)
    h = np.zeros((u.shape[0], *A.shape)) if initial_state is None else np.asarray(initial_state, np.float64)
    y, boundaries = np.empty_like(u), np.empty((*u.shape[:2], len(spans), A.shape[1]))
    for k, span in enumerate(spans):
        boundaries[:, :, k] = h
        u_k, delta_k, B_k, C_k, z_k = (_cut(x, span) for x in (u, delta, B, C, z))
        y[..., span], h = selective_scan_numpy(u_k, delta_k, A, B_k, C_k, D, z_k, delta_bias, delta_softplus,
                                               True, initial_state=h)  # fmt: skip
    return y, h, boundaries


class _ReverseWalk:
    """The gradients so far, and the adjoint that a walk from the last token to the first carries along."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, dy, dlast_state):
        self.A = _real(A)
        self.u, self.dy = (np.asarray(x, np.float64) for x in (u, dy))
        _expect("dy", self.dy, self.u.shape)
        self.B, self.C = (np.asarray(x, np.float64) for x in (B, C))
        before = np.asarray(delta, np.float64)
        if delta_bias is not None:
            before = before + np.asarray(delta_bias, np.float64)[:, None]
        self.delta, self.slope = _softplus(before) if delta_softplus else (before, np.ones_like(before))
        self.D = None if D is None else np.asarray(D, np.float64)
        self.z = None if z is None else np.asarray(z, np.float64)
        self.has_bias = delta_bias is not None
        gate = 1 if z is None else self.z * _sigmoid(self.z)
        self.dp = self.dy * gate  # (B, D, L), the gradient of what the gate multiplies
        self.p = np.zeros_like(self.u)
        self.du, self.ddelta = np.zeros_like(self.u), np.zeros_like(self.u)
        self.dA, self.dB, self.dC = (np.zeros(np.shape(x)) for x in (self.A, self.B, self.C))
        self.from_later = self.zero_state() if dlast_state is None else np.asarray(dlast_state, np.float64)
        _expect("dlast_state", self.from_later, self.zero_state().shape)

    def zero_state(self):
        return np.zeros((self.u.shape[0], *self.A.shape))  # (B, D, N)

    def back(self, start, states, h_before):
        """Walk back over tokens start .. start + l, whose states (B, D, l, N) follow h_before (B, D, N)."""
        for i in reversed(range(states.shape[2])):
            t, h, h_prev = start + i, states[:, :, i], states[:, :, i - 1] if i else h_before
            B_t, C_t = (_at(x, t, self.u.shape[1]) for x in (self.B, self.C))  # (B or 1, D or 1, N)
            u_t, delta_t, dp_t = (x[:, :, t, None] for x in (self.u, self.delta, self.dp))  # (B, D, 1)
            A_bar = np.exp(delta_t * self.A)  # (B, D, N)
            g = C_t * dp_t + self.from_later
            self.p[:, :, t] = (C_t * h).sum(-1)
            _add(self.dC, t, dp_t * h)
            _add(self.dB, t, g * delta_t * u_t)
            decayed = g * A_bar * h_prev
            self.du[:, :, t] = (g * delta_t * B_t).sum(-1)
            self.ddelta[:, :, t] = (g * B_t * u_t + decayed * self.A).sum(-1)
            self.dA += (decayed * delta_t).sum(0)
            self.from_later = A_bar * g

    def gradients(self):
        grads = {
            "du": self.du,
            "ddelta": self.ddelta * self.slope,
            "dA": self.dA,
            "dB": self.dB,
            "dC": self.dC,
        }
        p = self.p
        if self.D is not None:
            grads["du"] = self.du + self.D[:, None] * self.dp
            grads["dD"] = (self.dp * self.u).sum((0, 2))
            p = p + self.D[:, None] * self.u
        if self.z is not None:
            sigma = _sigmoid(self.z)
            grads["dz"] = self.dy * p * sigma * (1 + self.z * (1 - sigma))
        if self.has_bias:
            grads["ddelta_bias"] = grads["ddelta"].sum((0, 2))
        return grads | {"dinitial_state": self.from_later}


def _at(x, t, d_inner):
    """B or C at token t: constant (1, D, N), variable (B, 1, N), grouped (B, D, N)."""
    if x.ndim == 2:
        return x[None]
    return x[:, None, :, t] if x.ndim == 3 else np.repeat(x[..., t], d_inner // x.shape[1], axis=1)


def _add(grad, t, per_channel):
    """Add (B, D, N) to the gradient of B or C, summed over whatever shares one entry."""
    if grad.ndim == 2:  # constant: shared by batch and time
        grad += per_channel.sum(0)
        return
    batch, d_inner, d_state = per_channel.shape
    groups = grad.shape[1] if grad.ndim == 4 else 1
    summed = per_channel.reshape(batch, groups, d_inner // groups, d_state).sum(2)
    grad[..., t] = summed if grad.ndim == 4 else summed[:, 0]


def _real(A):
    if np.iscomplexobj(A):
        raise TypeError(f"A: got {np.asarray(A).dtype}; accepted here: a real A, (D, N)")
    return np.asarray(A, np.float64)


def _softplus(x):
    """log(1 + e^x) and its slope; both become those of the identity above 20, as in PyTorch."""
    low = np.minimum(x, 20)
    return np.where(x > 20, x, np.log1p(np.exp(low))), np.where(x > 20, 1, _sigmoid(low))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _cut(x, span):
    """The tokens of one chunk; a constant B or C (D, N), or an argument not given, has none."""
    return x if x is None or np.ndim(x) == 2 else x[..., span]


def _chunks(seqlen, chunk):
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}; accepted: 1 or more tokens")
    return [slice(start, min(start + chunk, seqlen)) for start in range(0, seqlen, chunk)]


def _expect(name, x, shape):
    if np.shape(x) != tuple(shape):
        raise ValueError(f"{name}: got shape {np.shape(x)}; accepted: {tuple(shape)}")
