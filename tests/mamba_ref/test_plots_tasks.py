"""The pictures of the synthetic tasks show the numbers they got."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mamba_ref import plots_tasks
from mamba_ref.plots import COLORS


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_tokens_are_written_and_coloured(ax):
    plots_tasks.tokens(ax, [2, 0, 1], ["a", "b", "S"], picked={1}, asked={2})
    assert texts(ax) == ["S", "a", "b"]
    colors = [patch.get_facecolor()[:3] for patch in ax.patches]
    assert colors[1:] == [plt.matplotlib.colors.to_rgb(COLORS[name]) for name in ("u", "y")]


def test_the_clock_has_a_dot_at_each_event(ax):
    plots_tasks.clock(ax, np.array([0, 1, 1, 2]), np.array([False, True, False, True]))
    stairs, dots = ax.lines
    assert stairs.get_ydata().tolist() == [0, 1, 1, 2]
    assert list(zip(*dots.get_data(), strict=True)) == [(1, 1), (3, 2)]


def test_delays_are_counted_once_each(ax):
    plots_tasks.delays(ax, np.array([[3, 90], [400, 5]]), np.full((2, 2), 4))
    heights = [sum(bar.get_height() for bar in bars) for bars in ax.containers]
    assert heights == [4, 4]


def test_learning_is_a_running_mean(ax):
    right = np.linspace(0, 1, 30)
    plots_tasks.learning(ax, {"S6": (right, "h")}, width=10)
    (line,) = ax.lines
    assert line.get_xdata()[[0, -1]].tolist() == [10, 30]
    assert line.get_ydata() == pytest.approx([100 * right[t - 10 : t].mean() for t in range(10, 31)])


def test_lengths_are_in_percent(ax):
    plots_tasks.lengths(ax, {"a": ({16: 1.0, 64: 0.5}, "h")}, 16, chance=0.25)
    curve, trained, chance = ax.lines
    assert list(zip(*curve.get_data(), strict=True)) == [(16, 100), (64, 50)]
    assert trained.get_xdata()[0] == 16
    assert chance.get_ydata()[0] == 25


def test_steps_are_in_the_order_of_the_channels(ax):
    delta = np.array([[1e-9, 1.0], [2.0, 3.0], [0.5, 0.25]])
    plots_tasks.steps(ax, delta, ["a", "b"], [2, 0])
    assert ax.images[0].get_array().tolist() == [[0.5, 0.25], [1e-9, 1.0]]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"]


def test_what_is_heard_stands_at_its_token(ax):
    plots_tasks.heard(ax, np.array([0.0, 2.0]), ["a", "b"], "title")
    assert [bar.get_height() for bar in ax.patches] == [0, 2]


def test_subsets_have_their_number(ax):
    plots_tasks.subsets(ax, {"Δ, B": 99.6, "C": 12.0}, 7)
    assert [bar.get_width() for bar in ax.patches] == [99.6, 12.0]
    assert texts(ax) == ["100", "12"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["Δ, B", "C"]
