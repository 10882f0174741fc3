"""The pictures of the roof and of measured times show the numbers they got."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mamba_ref import plots_roofline
from mamba_ref.roofline import queue

SPEEDS = {"memory": 4.0, "special": 2.0, "issue": 16.0}
WORK = {"memory": 8, "special": 16, "issue": 64}  # 2 s, 8 s, 4 s
COLORS = {"ours": "C0", "published": "C1"}


@pytest.fixture
def axes():
    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, 2)
    yield axes
    figure.canvas.draw()  # mathtext and layout errors appear here and not before
    plt.close(figure)


def points(ax):
    return np.concatenate([line.get_xydata() for line in ax.lines]).tolist()


def test_the_slowest_unit_holds_the_others_back():
    assert plots_roofline.best(WORK, SPEEDS, "special") == SPEEDS["special"]
    assert plots_roofline.best(WORK, SPEEDS, "issue") == 64 / 8 < SPEEDS["issue"]


def test_a_mark_touches_the_roof_of_the_unit_that_binds_it(axes):
    groups = {
        "forward": [(("label", 0, 0, "left"), WORK)],
        "none": [(("", 0, 0, "left"), WORK | {"special": 0})],
    }
    plots_roofline.roofline(axes, SPEEDS, groups, [(WORK, 16.0, "C0", "measured")])
    assert [2.0, 2.0] in points(axes[0])  # 16 exponentials, 8 bytes; at the full rate
    assert [8.0, 8.0] in points(axes[1])
    assert [2.0, 1.0] in points(axes[0])  # measured, twice as slow
    assert [8.0, 4.0] in points(axes[1])
    assert all(x > 0 for x, _ in points(axes[0]))  # what takes no exponentials has no place there


def test_times_by_number_of_states(axes):
    needs = [
        {"memory": 2e-12, "special": 1e-12, "issue": 5e-13},
        {"memory": 2e-12, "special": 4e-12, "issue": 3e-12},
    ]
    measured = [("forward", "ours", 1, 5e-12), ("backward", "ours", 2, 7e-12), ("forward", "ours", 2, 6e-12)]
    plots_roofline.by_states(axes, [1, 2], {"forward": needs, "backward": needs}, measured, COLORS)
    drawn = [np.round(points(ax), 6).tolist() for ax in axes]
    assert [1.0, 5.0] in drawn[0]
    assert [2.0, 6.0] in drawn[0]
    assert [2.0, 7.0] in drawn[1]
    assert [2.0, 4.0] in drawn[1]


def test_wrong_numbers_grow_from_one_to_both_sides(axes):
    plots_roofline.wrong_numbers(axes[0], {"long": 20.0, "short": 0.5, "nearly right": 0.96})
    texts = [text.get_text() for text in axes[0].texts]
    assert {"20 times", "2.0 times", "4%"} <= set(texts)
    assert [20.0, 0.0] in points(axes[0])
    assert [0.5, 1.0] in points(axes[0])


def test_a_timeline_has_a_bar_for_every_launch_and_kernel(axes):
    plots_roofline.timelines(axes[:1], {"two kernels, one launch": queue([10, 0], 3)})
    bars = [[path.get_extents().intervalx.tolist() for path in c.get_paths()] for c in axes[0].collections]
    assert bars == [[[0, 10]], [[10, 13], [13, 16]]]
    assert [line.get_xdata()[0] for line in axes[0].lines] == [10, 16]  # host done, device done


def test_every_case_has_a_line_under_its_heading():
    plt.switch_backend("agg")
    entries = [
        ("scan", "small", "forward", {"ours": 2.0, "published": 3.0}),
        ("scan", "small", "backward", {"ours": 4.0, "published": 6.0}),
        ("norm", "wide", "forward", {"ours": 1.5}),
    ]
    figure = plots_roofline.over_limit(entries, COLORS)
    forward, backward = figure.axes
    assert [text.get_text() for text in forward.get_yticklabels()] == ["scan", "small", "norm", "wide"]
    assert [2.0, 1] in points(forward)
    assert [1.5, 3] in points(forward)
    assert [6.0, 1] in points(backward)
    figure.canvas.draw()
    plt.close(figure)


def test_two_ratios_and_host_beside_device(axes):
    plots_roofline.two_ratios(axes[0], {"forward": [(2.0, 3.0)], "backward": [(1.5, 8.0)]})
    plots_roofline.host_and_device(axes[1], {"ours": [(0.1, 0.5)], "published": [(0.2, 0.4)]}, COLORS)
    assert [1.5, 8.0] in points(axes[0])
    assert [0.1, 0.5] in points(axes[1])
    assert [0.2, 0.4] in points(axes[1])
