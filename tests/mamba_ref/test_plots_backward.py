"""The graph of the scan has the arrows of the equations; the other pictures show the numbers they got."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mamba_ref import plots_backward
from mamba_ref.plots_backward import TOKENS, dataflow


@pytest.fixture
def ax():
    plt.switch_backend("agg")
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()  # mathtext is read only now
    plt.close(figure)


def test_forward_every_state_has_two_uses(ax):
    arrows = dataflow(ax)
    for k in range(len(TOKENS)):
        assert {end for start, end, _ in arrows if start == ("h", k)} == {("p", k), ("h", k + 1)}
        assert {start for start, end, _ in arrows if end == ("h", k)} == {("u", k), ("h", k - 1)}


def test_factors_stand_on_the_arrow_they_belong_to(ax):
    factors = {(start, end): factor for start, end, factor in dataflow(ax)}
    assert factors[("h", 0), ("h", 1)] == r"$\bar A_{t}$"
    assert factors[("u", 1), ("h", 1)] == r"$\Delta_{t} B_{t}$"
    assert factors[("h", 2), ("p", 2)] == "$C_{t+1}$"


def test_backward_turns_every_arrow_and_keeps_its_factor(ax):
    forward = dataflow(ax)
    ax.clear()
    assert dataflow(ax, backward=True) == [(end, start, factor) for start, end, factor in forward]
    shown = [text.get_text() for text in ax.texts]
    assert {"$g_{t}$", "$du_{t-1}$", "$dp_{t+1}$"} <= set(shown)
    assert "$h_{t}$" not in shown


def lines(ax):
    return [line.get_ydata() for line in ax.lines]


def drawn(axes):
    """Draw now: mathtext and layout errors appear here and not before."""
    axes[0].figure.canvas.draw()
    plt.close(axes[0].figure)


@pytest.fixture
def axes():
    plt.switch_backend("agg")
    _, axes = plt.subplots(1, 2)
    return axes


def test_blame_is_drawn_over_tokens_and_over_clock_time(axes):
    A, tau = np.array([-1.0, -4.0]), np.cumsum([0.1, 0.1, 0.5, 0.1, 0.1])
    g = np.exp(A * (tau[-1] - tau)[:, None])
    plots_backward.blame(axes, g, tau, A, held=(1, 1), cut=2)
    by_token, by_clock = ([line for line in ax.lines if len(line.get_xdata()) == 5] for ax in axes)
    for n, (token, clock) in enumerate(zip(by_token, by_clock, strict=True)):
        assert (token.get_ydata() == g[:, n]).all()
        assert (token.get_xdata() == np.arange(5)).all()
        assert np.allclose(np.log(clock.get_ydata()), A[n] * clock.get_xdata())
    drawn(axes)


def test_slopes_fills_where_the_gate_falls(axes):
    x = np.linspace(-6, 4, 101)
    plots_backward.slopes(axes, x, x, x, x, np.sin(x))
    assert len(axes[1].collections) == 1
    assert not axes[0].collections
    drawn(axes)


def test_memory_pictures_show_what_was_counted_and_what_was_predicted(axes):
    def predicted(seqlen):
        return {"autograd": 33 * seqlen, "all states": 16 * seqlen, "chunks": 32 * seqlen**0.5}

    lengths = [16, 64]
    measured = {name: [predicted(seqlen)[name] + 1 for seqlen in lengths] for name in predicted(1)}
    plots_backward.memory_by_length(axes[0], lengths, measured, predicted)
    assert [list(y) for y in lines(axes[0]) if len(y) == 2] == list(measured.values())
    chunks = 2 ** np.arange(5)
    plots_backward.memory_by_chunk(axes[1], chunks, 16 / chunks, chunks, 16 / chunks + chunks + 1, 16)
    assert (lines(axes[1])[2] + 1 == lines(axes[1])[3]).all()
    drawn(axes)


def test_lost_digits_has_both_forms_in_both_panels(axes):
    exponent = np.array([1.0, 8.0])
    w_lost = {"kept apart": np.array([1e-7, 2e-7]), "h - x": np.array([1e-7, 1e-4])}
    dA_lost = {name: 2 * value for name, value in w_lost.items()}
    plots_backward.lost_digits(axes, exponent, w_lost, dA_lost)
    for ax, lost in zip(axes, (w_lost, dA_lost), strict=True):
        assert [list(y) for y in lines(ax)[:2]] == [list(lost[name]) for name in ("kept apart", "h - x")]
    drawn(axes)
