"""The shared figures: what they choose to show, and that they can be drawn for every legal input."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scan_inputs import scan_inputs

from mamba_ref import plots, toy
from mamba_ref.inspect import trace


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    plt.switch_backend("agg")
    plt.close("all")
    yield
    plt.close("all")


def test_byte_labels_has_one_printable_character_a_byte():
    text = "aΔ b\n\t\r\x00~".encode()
    assert plots.byte_labels(text) == ["a", "Δ", " ", " ", "b", "↵", "→", " ", "?", "~"]
    assert len(plots.byte_labels(bytes(range(256)))) == 256


def test_byte_labels_of_a_character_the_font_lacks_or_a_cut_one():
    assert plots.byte_labels("语a".encode()) == ["?", " ", " ", "a"]
    assert plots.byte_labels("Δ".encode()[:1]) == ["?"]
    assert plots.byte_labels("Δ".encode()[1:]) == [" "]


@pytest.mark.parametrize("lively", [0, 3, 5])
def test_liveliest_finds_the_channel_whose_delta_moves_and_whose_state_is_heard(lively):
    inputs = scan_inputs(seed=1, batch=1, d_inner=6, seqlen=40, initial_state=False)
    inputs["delta"][:, np.arange(6) != lively] /= 50
    assert plots.liveliest(trace(**inputs)) == lively
    inputs["D"][lively] = 1e6  # now the skip drowns its state
    assert plots.liveliest(trace(**inputs)) != lively


def shown(path):
    return plt.imread(path)


@pytest.mark.parametrize("seqlen", [1, 2, 65])
def test_plot_comparison_draws_any_length_and_any_output(seqlen, tmp_path):
    seen = trace(**scan_inputs(seed=seqlen, seqlen=seqlen))
    poisoned = seen.gated.copy()
    poisoned[..., -1] = np.nan
    pictures = []
    for k, y in enumerate((seen.gated, seen.gated * (1 + 1e-6), poisoned)):
        path = tmp_path / f"{k}.png"
        channel = plots.plot_comparison(seen, y, None, "f", "random inputs", "a verdict", path)
        assert channel == plots.liveliest(seen)
        pictures.append(shown(path))
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()


def test_plot_comparison_shows_the_characters_it_is_given(tmp_path):
    seen = trace(**scan_inputs(seed=7, seqlen=8))
    for name, text in (("a", b"abcdefgh"), ("b", b"abcdefgX"), ("c", b"abcdefgX")):
        labels = plots.byte_labels(text)
        plots.plot_comparison(
            seen, seen.gated, labels, "f", "text", "a verdict", tmp_path / f"{name}.png", tokens=8
        )
    a, b, c = (shown(tmp_path / f"{name}.png") for name in "abc")
    assert (a != b).any()
    assert (b == c).all()  # and drawing twice gives the same picture


def test_a_step_of_zero_is_white_and_a_constant_step_is_drawn():
    figure, axes = plt.subplots(2)
    plots.delta_strip(axes[0], trace(**toy.scan_inputs()).delta[0, 0], toy.signal().labels)
    plots.delta_strip(axes[1], np.full(5, 0.3))
    figure.canvas.draw()
    steps, constant = (ax.images[0].get_array()[0] for ax in axes)
    assert [t.get_text() for t in axes[0].texts] == toy.signal().labels
    assert steps.tolist() == [8.0 if m else 0.0 for m in toy.signal().mark]
    assert constant.tolist() == [0.3] * 5
