"""One toy for the whole series: twelve tokens arrive, three are marked; always know the last marked value.

    t       0    1    2    3    4    5    6    7    8    9   10   11
    x_t    -1  [ 3]   2   -3    1  [-2]   3   -1  [ 1]  -2    2   -1
    want    0    3    3    3    3   -2   -2   -2    1    1    1    1

Marked and unmarked values have the same size, so only the mark tells them apart.

- 00 What is a state space model? A leaky integrator with one state hears the marked values alone
  (`x * mark`): each spike enters, then fades. Its impulse response is the memory curve.
- 01 Discretization. The same integrator in continuous time, the input held for one token
  (`held`), stepped by Euler, bilinear, ZOH and the rule of Mamba's code.
- 02 Selectivity. The whole strip, unmarked values included. No fixed (delta, B, C) can ignore
  them; a step size delta_t that is large at a mark and 0 elsewhere can.
- 03 One operator, three algorithms. The 12 x 12 map from x to y: Toeplitz for the integrator of
  00, not for the selective one of 02; then the same y by scans of depth 4.
- 04 From loop to kernel. `scan_inputs()` is the smallest call of every rung of the ladder.
- 06 Convolution, gate, norm. The strip through four taps: a sum, a band, a shift register.
- 10 Watching the state. delta, decay, state and influence matrix of the selective integrator,
  where the right picture is known in advance.
"""

from typing import NamedTuple

import numpy as np

VALUES = (-1, 3, 2, -3, 1, -2, 3, -1, 1, -2, 2, -1)
MARKED = (1, 5, 8)


class Signal(NamedTuple):
    """The strip: x, mark, want are float64 (L,) with L = 12; labels: L strings, marked in brackets."""

    x: np.ndarray
    mark: np.ndarray
    want: np.ndarray
    labels: list


def signal():
    """The strip of twelve tokens: values x_t, marks m_t in {0, 1}, the last marked value, axis labels.

    want_t is x_s for the latest marked s <= t, and 0 before the first mark.
    """
    x = np.array(VALUES, float)
    mark = np.zeros(len(x))
    mark[list(MARKED)] = 1
    want = np.zeros(len(x))
    for t in range(len(x)):
        want[t] = x[t] if mark[t] else want[t - 1] if t else 0.0
    labels = [f"[{v}]" if m else f"{v}" for v, m in zip(VALUES, mark, strict=True)]
    return Signal(x, mark, want, labels)


def held(t, x, step=1.0):
    """The strip in continuous time: x(t) = x_k for k step <= t < (k + 1) step, and 0 outside.

    t: times, any shape, in the unit of `step`. x: (L,). Returns an array of t's shape.
    """
    k = np.floor(np.asarray(t, float) / step).astype(int)
    inside = (k >= 0) & (k < len(x))
    return np.where(inside, np.asarray(x, float)[np.clip(k, 0, len(x) - 1)], 0.0)


def scan_inputs(step_marked=8.0, step_plain=0.0):
    """The strip as float64 arguments u, delta, A, B, C of `selective_scan`, with batch = D = N = 1.

    A = -1 and C = 1. delta_t is `step_marked` at a mark and `step_plain` elsewhere; B_t makes
    delta_t B_t = 1 - exp(-delta_t) = g_t, so that y_t = h_t = (1 - g_t) h_{t-1} + g_t x_t.
    The default step_marked = 8 overwrites at a mark (g = 0.9997) and step_plain = 0 holds (g = 0):
    y_t = want_t within 2e-3. Equal steps give the leaky integrator, a fixed linear system.

    Returns a dict of arrays: u, delta, B, C (1, 1, L) and A (1, 1).
    """
    x, mark, _, _ = signal()
    delta = np.where(mark == 1, float(step_marked), float(step_plain))
    gate = -np.expm1(-delta)
    B = np.divide(gate, delta, out=np.ones_like(delta), where=delta != 0)
    u, delta, B, C = (v[None, None] for v in (x, delta, B, np.ones_like(x)))
    return {"u": u, "delta": delta, "A": -np.ones((1, 1)), "B": B, "C": C}
