"""From h'(t) = A h(t) + B x(t) to h_t = A_bar h_{t-1} + B_bar x_t: four rules for one step of length delta.

Paper: Section 2, "Discretization", equation 4 (zero-order hold). The published code replaces
its B_bar by delta B; that rule is called :func:`mamba` here. Exactly,

    h(t + delta) = exp(delta A) h(t) + integral_0^delta exp((delta - s) A) B x(t + s) ds,

and the rules differ in what they put for the two terms:

    rule      A_bar                         B_bar                    exact when
    euler     1 + delta A                   delta B                  never
    bilinear  (1 + delta A/2)/(1 - delta A/2)  delta B/(1 - delta A/2)  never
    zoh       exp(delta A)                  (exp(delta A) - 1)/A B   x is constant over the step
    mamba     exp(delta A)                  delta B                  x is a spike of area delta x_t at its end

A is diagonal and given as its entries, real or complex, so everything is elementwise and the
arrays broadcast: delta (B, D, L, 1), A (D, 1, N) and B (B, 1, L, N) give (B, D, L, N). For a
dense (N, N) matrix see :func:`dense`.
"""

import numpy as np


def euler(delta, A, B):
    """Forward Euler: A_bar = 1 + delta A, B_bar = delta B, from (h_t - h_{t-1})/delta = A h_{t-1} + B x_t.

    delta, A, B broadcast; delta and 1/A in the same unit of time. Returns (A_bar, B_bar), of the
    shapes of delta A and delta B. Local error O(delta^2), global order 1; stable for |1 + delta A| < 1.
    """
    z, delta, _, B = _prepare(delta, A, B)
    return 1 + z, delta * B


def bilinear(delta, A, B):
    """Bilinear (trapezoid, Tustin): A_bar = (1 + delta A/2)/(1 - delta A/2), B_bar = delta B/(1 - delta A/2).

    From (h_t - h_{t-1})/delta = A (h_t + h_{t-1})/2 + B x_t. delta, A, B broadcast. Returns
    (A_bar, B_bar). Global order 2; stable for Re(A) < 0 at any step, but A_bar -> -1 as
    delta -> infinity. delta A = 2 has no such step and gives an infinity.
    """
    z, delta, _, B = _prepare(delta, A, B)
    return (1 + z / 2) / (1 - z / 2), delta * B / (1 - z / 2)


def zoh(delta, A, B):
    """Zero-order hold: A_bar = exp(delta A), B_bar = (delta A)^-1 (exp(delta A) - 1) delta B (equation 4).

    delta, A, B broadcast. Returns (A_bar, B_bar). Exact for an input constant over each step.
    B_bar is delta phi(delta A) B, accurate to a few roundings for every delta A, 0 included.
    """
    z, delta, _, B = _prepare(delta, A, B)
    return np.exp(z), delta * phi(z) * B


def mamba(delta, A, B):
    """The rule of the published code: A_bar = exp(delta A) as in ZOH, B_bar = delta B as in Euler.

    delta, A, B broadcast. Returns (A_bar, B_bar), of the shapes of delta A and delta B. Exact for
    an input that arrives as one spike of area delta x_t at the end of each step; global order 1
    for a held input, whose B_bar it exceeds by the factor 1/phi(delta A) = 1 - delta A/2 + ...
    """
    z, delta, _, B = _prepare(delta, A, B)
    return np.exp(z), delta * B


def phi(z):
    """phi(z) = (exp(z) - 1)/z = 1 + z/2 + z^2/6 + ..., with phi(0) = 1; elementwise, real or complex.

    The mean of exp(s) over s in [0, z]: what is left, at the end of a step, of an input held during it.
    expm1 keeps the digits that exp(z) - 1 cancels for small z.
    """
    z = np.asarray(z)
    zero = z == 0
    return np.where(zero, 1, np.expm1(z) / np.where(zero, 1, z))


def dense(rule, delta, A, B):
    """Any of the four rules for a dense A (N, N), B (N,) and one number delta, through the modes of A.

    A = V diag(a) V^-1, so h = V g turns the system into N separate modes g' = a g + V^-1 B x;
    `rule` discretizes each, and V brings A_bar (N, N) and B_bar (N,) back. Real for real A and B.
    Raises ValueError where A has no usable basis of eigenvectors (condition number above 1e8: half
    of the digits would be lost). Costs O(N^3) operations, once.
    """
    A, B = np.asarray(A), np.asarray(B)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or B.shape != A.shape[:1]:
        raise ValueError(f"A and B: got shapes {A.shape} and {B.shape}; accepted are (N, N) and (N,)")
    a, V = np.linalg.eig(A)
    condition = np.linalg.cond(V)
    if not condition < 1e8:
        raise ValueError(f"A: its eigenvectors have condition number {condition:.1e}; accepted is below 1e8")
    modes_bar, B_bar = rule(delta, a, np.linalg.solve(V, B))
    A_bar, B_bar = (V * modes_bar) @ np.linalg.inv(V), V @ B_bar
    return (A_bar, B_bar) if np.iscomplexobj(A) or np.iscomplexobj(B) else (A_bar.real, B_bar.real)


def _prepare(delta, A, B):
    """(delta A, delta, A, B) as arrays; ValueError names the shapes when they do not broadcast."""
    delta, A, B = np.asarray(delta), np.asarray(A), np.asarray(B)
    try:
        np.broadcast_shapes(delta.shape, A.shape, B.shape)
    except ValueError:
        raise ValueError(
            f"delta, A, B: shapes {delta.shape}, {A.shape}, {B.shape} do not broadcast; add axes of length 1"
        ) from None
    return delta * A, delta, A, B
