"""The toy says what its docstring says, and its hand-set selective scan solves it."""

import numpy as np
import pytest

from mamba_ref import toy
from mamba_ref.selective_scan import selective_scan_numpy


def test_the_strip_is_the_one_in_the_docstring():
    x, mark, want, labels = toy.signal()
    assert len(labels) == 12
    assert x.shape == mark.shape == want.shape == (12,)
    rows = {line.split()[0]: line.split()[1:] for line in toy.__doc__.splitlines() if line.startswith("    ")}
    assert [float(v) for v in rows["want"]] == want.tolist()
    strip = " ".join(rows["x_t"]).replace("[ ", "[").split()
    assert strip == labels
    assert [label.startswith("[") for label in labels] == (mark == 1).tolist()
    assert [float(label.strip("[]")) for label in labels] == x.tolist()


def test_the_values_alone_do_not_tell_which_are_marked():
    x, mark, _, _ = toy.signal()
    for value in np.unique(np.abs(x[mark == 1])):
        assert np.isin(value, np.abs(x[mark == 0]))


def test_held():
    x = toy.signal().x
    t = np.array([-0.1, 0.0, 0.99, 1.0, 11.5, 12.0])
    assert toy.held(t, x).tolist() == [0, -1, -1, 3, -1, 0]
    assert toy.held(t / 4, x, step=0.25).tolist() == toy.held(t, x).tolist()


def test_large_steps_at_the_marks_solve_it():
    y = selective_scan_numpy(**toy.scan_inputs())[0, 0]
    want = toy.signal().want
    assert 1e-4 < np.abs(y - want).max() <= 5 * np.exp(-8.0) * 1.01  # the largest change is from 3 to -2
    assert y[2] == y[1]  # an unmarked token leaves the state as it was, to the bit


@pytest.mark.parametrize("step", [0.1, 1.0])
def test_equal_steps_give_the_leaky_integrator(step):
    x, h, want = toy.signal().x, 0.0, []
    for value in x:
        h = np.exp(-step) * h + (1 - np.exp(-step)) * value
        want.append(h)
    got = selective_scan_numpy(**toy.scan_inputs(step, step))[0, 0]
    np.testing.assert_allclose(got, want, rtol=0, atol=12 * 4 * np.finfo(float).eps * 3)
