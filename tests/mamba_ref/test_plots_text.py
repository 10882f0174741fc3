"""The pictures of the language model show the numbers they got."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from mamba_ref import plots_text


@pytest.fixture
def axes():
    plt.switch_backend("agg")
    figure, axes = plt.subplots(2, 3, squeeze=False)
    yield axes
    figure.canvas.draw()  # mathtext and layout errors appear here and not before
    plt.close(figure)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_learning_shows_every_step_and_its_mean(axes):
    ax, losses = axes[0, 0], np.linspace(8, 2, 60)
    plots_text.learning(ax, losses, [4.5, 3.5])
    dots, mean, *levels = ax.lines
    assert dots.get_ydata().tolist() == losses.tolist()
    assert mean.get_xdata()[0] == 19
    assert mean.get_ydata() == pytest.approx([losses[t - 19 : t + 1].mean() for t in range(19, 60)])
    assert [line.get_ydata()[0] for line in levels] == [4.5, 3.5]
    assert texts(ax) == ["0 bytes", "1 byte"]


def test_scores_are_bars_in_order(axes):
    ax = axes[0, 0]
    plots_text.scores(ax, {"a": (3.25, "h"), "b": (1.5, "other")})
    assert [bar.get_width() for bar in ax.patches] == [3.25, 1.5]
    assert texts(ax) == ["3.25", "1.50"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_context_has_a_stair_between_edges(axes):
    ax = axes[0, 0]
    plots_text.context(ax, np.array([1, 3, 9, 20]), np.array([1.5, 0.2, -0.001]), 5)
    values, edges, _ = ax.patches[0].get_data()
    assert (values.tolist(), edges.tolist()) == ([1.5, 0.2, -0.001], [1, 3, 9, 20])
    assert ax.lines[0].get_xdata()[0] == 5
    assert texts(ax) == ["a table sees 5 bytes"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "symlog")


def test_knobs_show_the_likeliest_bytes_and_what_was_cut(axes):
    p = torch.zeros(256)
    p[[101, 32, 10]] = torch.tensor([0.5, 0.3, 0.2])
    q = torch.zeros(256)
    q[[101, 32]] = torch.tensor([0.625, 0.375])
    plots_text.knobs(axes, {"as it is": [p, p], "cut": [q, p], "more": [p, q]}, ("first", "second"))
    cut = axes[0, 1]
    before, after = cut.patches[: plots_text.SHOWN], cut.patches[plots_text.SHOWN :]
    assert [bar.get_height() for bar in before[:4]] == pytest.approx([0.5, 0.3, 0.2, 0])
    assert [bar.get_height() for bar in after[:4]] == pytest.approx([0.625, 0.375, 0, 0])
    assert cut.lines[0].get_xdata().tolist() == list(range(2, plots_text.SHOWN))
    assert [t.get_text() for t in cut.get_xticklabels()][:3] == ["e", " ", "↵"]
    places = ("left", "center")  # the style decides
    titles = ["".join(ax.get_title(loc=place) for place in places) for ax in axes[0]]
    assert titles == ["as it is", "cut", "more"]
    assert axes[1, 0].get_ylabel().endswith("second")


def test_memory_goes_through_its_dots(axes):
    ax = axes[0, 0]
    lengths = np.array([2, 8])
    plots_text.memory(ax, {"small": (lengths, np.array([80.0, 80.0]), np.array([4.0, 16.0]))})
    flat, state, rising, cache, cross = ax.lines
    assert flat.get_ydata().tolist() == [80, 80]
    assert rising.get_ydata().tolist() == [2, 2 * 2**17]
    assert (state.get_ydata().tolist(), cache.get_ydata().tolist()) == ([80, 80], [4, 16])
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (40, 80)
    assert texts(ax) == ["state, small", "cache, small"]
