"""The pictures of the block show the shapes, the register and the counts they got."""

import numpy as np
import pytest

from mamba_ref import plots_block

SHAPES = {
    "hidden_states": (2, 7, 5), "x": (2, 10, 7), "z": (2, 10, 8), "u": (2, 10, 9), "delta": (2, 10, 6),
    "B": (2, 3, 7), "C": (2, 4, 7), "y": (2, 11, 7), "out": (2, 7, 6),
}  # fmt: skip


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_the_map_has_every_box_and_every_shape(ax):
    plots_block.block_map(ax, SHAPES)
    shown = "\n".join(texts(ax))
    for name, shape in SHAPES.items():
        sign = plots_block.SIGNS.get(name, name)
        assert shown.count(f"{sign} {'×'.join(map(str, shape))}") == 1
    for *_, text, _ in plots_block.BOXES.values():
        assert text in texts(ax)
    dark = [name for name, (*_, looks) in plots_block.BOXES.items() if looks]
    assert dark == ["conv1d", "scan"]


def test_the_register_shows_the_newest_value_on_top(ax):
    states = np.array([[0, 0, 5], [0, 5, -2], [5, -2, 7], [-2, 7, 1]])
    plots_block.shift_register(ax, states, list("abcd"))
    shown = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in ax.texts}
    assert shown == {(t, 2 - k): str(states[t, k]) for t in range(4) for k in range(3)}
    assert ax.images[0].get_array().tolist() == states.T[::-1].tolist()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["now", "1 ago", "2 ago"]
    assert [t.get_text() for t in ax.get_xticklabels()] == list("abcd")


def test_the_bars_are_the_shares(ax):
    parts = {"small": dict(a=60, b=30, c=4, d=3, e=2, f=1), "large": dict(a=120, b=70, c=4, d=3, e=2, f=1)}
    plots_block.budget(ax, parts)
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([n / sum(row.values()) for row in parts.values() for n in row.values()])
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    assert ends[5] == pytest.approx(1)
    assert ends[11] == pytest.approx(1)
    assert {"60%", "30%", "35%", *"abcdef"} <= set(texts(ax))
