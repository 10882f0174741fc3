"""Look inside a running scan: Δ, decay, horizon, every state, and which token influences which.

    from mamba_ref.inspect import trace, trace_block, trace_model
    seen = trace_block(block, hidden)        # or trace(u, delta, A, B, C, ...) for the bare operator
    seen = trace_model(model, input_ids)[0]  # or what one layer of a whole model did
    seen.delta, seen.decay, seen.horizon, seen.states, seen.influence(channel=3)

Everything is NumPy float64, computed by the oracle of :mod:`mamba_ref.selective_scan`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mamba_ref.selective_scan import _per_channel_numpy, selective_scan_numpy


@dataclass(frozen=True)
class Trace:
    """What a scan did at every token: h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = C_t h_t + D u_t.

    u, delta, y, gated: (B, D, L). Here delta is Δ itself, after delta_bias and softplus; y is the
    output before the gate and gated = y SiLU(z) (equal to y where z is absent). A: (D, N). B, C:
    (B or 1, D, L or 1, N), spread over the channels. D: (D,). states: (B, D, L, N), the state after
    each token. initial_state: (B, D, N). All float64.
    """

    u: np.ndarray
    delta: np.ndarray
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    initial_state: np.ndarray
    states: np.ndarray
    y: np.ndarray
    gated: np.ndarray

    @property
    def decay(self):
        """A_bar = exp(Δ A), (B, D, L, N): the part of each state number that survives token t."""
        return np.exp(self.delta[..., None] * self.A[:, None])

    @property
    def horizon(self):
        """1 / (Δ |A|), (B, D, L, N), in tokens: at this token's pace the state falls to 1/e in so many."""
        with np.errstate(divide="ignore"):
            return 1 / np.abs(self.delta[..., None] * self.A[:, None])

    @property
    def half_life(self):
        """ln 2 / (Δ |A|), (B, D, L, N), in tokens: at this token's pace the state halves in so many."""
        return np.log(2) * self.horizon

    @property
    def clock(self):
        """τ_t = Δ_1 + ... + Δ_t, (B, D, L), in units of Δ: the time that passed inside each channel.

        The decay from token s to token t is exp(A (τ_t - τ_s)), however Δ varied in between.
        """
        return np.cumsum(self.delta, axis=-1)

    def influence(self, channel=0, batch=0):
        """M (L, L) of one channel, lower triangular: y_t = sum_s M[t, s] u_s, before the gate.

        M[t, s] = C_t · (A_bar_t A_bar_{t-1} ... A_bar_{s+1}) · Δ_s B_s, plus D on the diagonal. The
        product is taken as exp(A (τ_t - τ_s)), which neither underflows early nor divides. Where the
        state does not start at zero, y = M u + `carried`. Costs about 4 L^2 N operations and 32 L^2
        bytes. Raises IndexError for a channel or batch row that is not there.
        """
        A, B, C = self.A[channel], *self._per_token(channel, batch)
        tau = self.clock[batch, channel]
        past = np.tri(len(tau), dtype=bool)
        passed = np.where(past, tau[:, None] - tau[None, :], 0)  # (L, L), clock time from s to t
        M = np.diag(np.full(len(tau), self.D[channel]))
        for n in range(len(A)):
            written = self.delta[batch, channel] * B[:, n]  # (L,), what one unit of u_s writes
            M += np.where(past, C[:, n, None] * np.exp(A[n] * passed) * written, 0)
        return M

    def carried(self, channel=0, batch=0):
        """The output that comes from initial_state alone, (L,): C_t · exp(A τ_t) · h_0."""
        _, C = self._per_token(channel, batch)
        tau = self.clock[batch, channel]
        return (C * np.exp(tau[:, None] * self.A[channel]) * self.initial_state[batch, channel]).sum(-1)

    def _per_token(self, channel, batch):
        """B and C of one channel at every token, both (L, N)."""
        size = (self.u.shape[-1], self.A.shape[1])
        return (np.broadcast_to(x[batch if len(x) > 1 else 0, channel], size) for x in (self.B, self.C))


def trace(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *, initial_state=None):
    """Run the oracle on the arguments of `selective_scan` and keep all it went through.

    Paper: Algorithm 2, lines 3 to 6. Shapes as in :func:`mamba_ref.selective_scan.selective_scan`,
    arrays or tensors, A real; everything is read as float64. Returns a :class:`Trace`. Raises
    TypeError for complex A. Costs about 6 B D L N operations and 8 B D L N bytes.
    """
    u, delta, A, B, C, D, z, delta_bias, initial_state = map(
        _array, (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    if np.iscomplexobj(A):
        raise TypeError(f"A: got {A.dtype}, but a horizon 1 / (Δ |A|) is defined for real A alone")
    batch, d_inner, _ = u.shape
    D = np.zeros(d_inner) if D is None else D
    initial_state = np.zeros((batch, *A.shape)) if initial_state is None else initial_state
    y, states = selective_scan_numpy(u, delta, A, B, C, D, None, delta_bias, delta_softplus,
                                     initial_state=initial_state, return_states=True)  # fmt: skip
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    if delta_softplus:  # the identity above 20, as published
        delta = np.where(delta > 20, delta, np.log1p(np.exp(np.minimum(delta, 20))))
    B, C = (np.moveaxis(_per_channel_numpy(x, A.dtype, d_inner), 2, 3) for x in (B, C))
    B, C = (np.broadcast_to(x, (x.shape[0], d_inner, *x.shape[2:])) for x in (B, C))
    gated = y if z is None else y * (z / (1 + np.exp(-z)))
    return Trace(u, delta, A, B, C, D, initial_state, states, y, gated)


def trace_block(block, hidden):
    """The :class:`Trace` of a `MambaBlock` reading hidden (B, L, d_model): what its scan did."""
    with torch.no_grad():
        return trace(**block.scan_inputs(hidden))


def trace_model(model, input_ids):
    """One :class:`Trace` a layer of a `MambaLM` reading input_ids (B, L): what each scan did."""
    hidden = []  # (B, L, d_model), what each layer's norm hands to its block
    hooks = [
        layer.norm.register_forward_hook(lambda _, given, out: hidden.append(out[0]))
        for layer in model.backbone.layers
    ]
    try:
        with torch.no_grad():
            model(input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [trace_block(layer.mixer, x) for layer, x in zip(model.backbone.layers, hidden, strict=True)]


def _array(x):
    if x is None:
        return None
    x = x.detach().cpu() if isinstance(x, torch.Tensor) else x
    x = x.double().numpy() if isinstance(x, torch.Tensor) and not x.is_complex() else np.asarray(x)
    return x if np.iscomplexobj(x) else x.astype(np.float64)
