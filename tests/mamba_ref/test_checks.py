"""A check must be able to fail: NaN, infinities, wrong values and wrong shapes never pass."""

import math

import numpy as np
import pytest
import torch

from mamba_ref import checks
from mamba_ref.checks import bound, check, claims_table, errors

ONES = np.ones((2, 3))
HUGE = 1e300


def with_entry(value):
    x = ONES.copy()
    x[1, 2] = value
    return x


@pytest.fixture(autouse=True)
def _fresh_claims(monkeypatch):
    monkeypatch.setattr(checks, "_claims", checks.Claims())


def test_errors_are_the_largest_and_the_relative_norm():
    # (3, 4) - (3, 0) = (0, 4) has largest entry 4 and norm 4; the norm of (3, 0) is 3.
    assert errors(np.array([3.0, 4.0]), np.array([3.0, 0.0])) == (4.0, 4 / 3)


def test_errors_of_a_zero_want_are_absolute():
    assert errors(np.array([3.0, 4.0]), np.zeros(2)) == (4.0, 5.0)


def test_errors_accept_numbers_tensors_and_complex():
    assert errors(1.5, 1.0) == (0.5, 0.5)
    assert errors(torch.tensor([1.0 + 3j]), np.array([1.0 + 0j])) == (3.0, 3.0)
    assert errors(torch.ones(2, dtype=torch.bfloat16), np.ones(2)) == (0.0, 0.0)
    assert errors(torch.ones(2, requires_grad=True), np.ones(2)) == (0.0, 0.0)
    assert errors(np.empty((0, 3)), np.empty((0, 3))) == (0.0, 0.0)


def test_errors_are_taken_in_float64():
    assert errors(np.array([1 + 2.0**-40]), np.array([1.0]))[0] == 2.0**-40


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_or_infinity_on_one_side_never_passes(bad):
    for got, want in ((with_entry(bad), ONES), (ONES, with_entry(bad)), (with_entry(bad), 0 * ONES)):
        with pytest.raises(AssertionError, match="claim"):
            check("claim", got, want, HUGE)


def test_infinities_of_opposite_sign_never_pass():
    with pytest.raises(AssertionError):
        check("claim", with_entry(math.inf), with_entry(-math.inf), HUGE)


def test_a_nan_expected_in_the_same_place_passes_and_hides_nothing():
    check("claim", with_entry(math.nan), with_entry(math.nan), 0)
    got = with_entry(math.nan)
    got[0, 0] = 2
    with pytest.raises(AssertionError):
        check("claim", got, with_entry(math.nan), 0.1)


def test_a_nan_bound_passes_nothing():
    with pytest.raises(AssertionError):
        check("claim", ONES, ONES, math.nan)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (1, 3), (2, 1), ()])
def test_a_wrong_shape_raises_and_is_never_broadcast(shape):
    with pytest.raises(ValueError, match="shape"):
        check("claim", np.ones(shape), ONES, HUGE)


def test_a_wrong_value_fails_just_above_its_bound():
    # One entry of six ones is off by 0.1: relative error 0.1 / sqrt(6) = 0.0408.
    check("claim", with_entry(1.1), ONES, 0.041)
    with pytest.raises(AssertionError, match=r"claim: relative error 4\.08e-02 is above the bound 4\.00e-02"):
        check("claim", with_entry(1.1), ONES, 0.04)


def test_bound_zero_means_bitwise():
    check("claim", ONES, ONES.copy(), 0)
    with pytest.raises(AssertionError):
        check("claim", with_entry(np.nextafter(1, 2)), ONES, 0)


def test_bound_is_k_times_the_plain_error_plus_a_floor():
    want = np.array([1.0, 1.0])
    plain = torch.tensor([1.0, 1.5])  # relative error 0.5 / sqrt(2)
    floor = checks.FLOOR * 2.0**-24
    assert bound(plain, want) == pytest.approx(checks.K * 0.5 / math.sqrt(2) + floor, rel=1e-12)
    assert bound(torch.tensor([1.0, 1.0]), want) == floor
    assert bound(plain.bfloat16(), plain) == checks.FLOOR * 2.0**-8
    assert bound(np.ones(2, np.float64), want) == checks.FLOOR * 2.0**-53
    assert bound(torch.ones(2), want, dtype=torch.float16) == checks.FLOOR * 2.0**-11


def test_a_plain_result_with_a_nan_does_not_make_a_usable_bound():
    limit = bound(torch.tensor([math.nan, 1.0]), np.ones(2))
    with pytest.raises(AssertionError):
        check("claim", with_entry(math.nan), ONES, limit)


def test_check_prints_one_line_and_the_table_holds_every_claim(capsys):
    check("first", ONES, ONES, 0)
    check("second", with_entry(1.1), ONES, 0.5)
    with pytest.raises(AssertionError):
        check("third", with_entry(9), ONES, 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["first", "second", "third"]
    assert [line.split()[-1] for line in lines] == ["pass", "pass", "FAIL"]
    table = claims_table().splitlines()
    assert table[0] == "| claim | max error | relative error | bound |"
    assert table[2:4] == [
        "| first | 0.0e+00 | 0.0e+00 | 0.0e+00 |",
        "| second | 1.0e-01 | 4.1e-02 | 5.0e-01 |",
    ]
    assert "third" in table[4]
