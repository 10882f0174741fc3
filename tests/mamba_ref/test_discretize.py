"""Each rule against an independent computation of what it approximates, and its limits."""

from fractions import Fraction

import numpy as np
import pytest

from mamba_ref.discretize import bilinear, dense, euler, mamba, phi, zoh

EPS = np.finfo(float).eps
RULES = (euler, bilinear, zoh, mamba)
SIZES = (1, 2, 63, 64, 65, 100)


def series_phi(z):
    """phi at one double by its Taylor series in exact fractions, to 40 terms."""
    z, term, total = Fraction(z), Fraction(1), Fraction(0)
    for k in range(1, 41):
        total += term
        term *= z / (k + 1)
    return float(total)


def expm_taylor(A):
    """exp(A) by scaling, a Taylor series and repeated squaring: nothing of eigenvectors."""
    squarings = max(0, int(np.ceil(np.log2(np.abs(A).sum(1).max()))) + 4)
    small, term, total = A / 2**squarings, np.eye(len(A)), np.eye(len(A))
    for k in range(1, 16):
        term = term @ small / k
        total = total + term
    for _ in range(squarings):
        total = total @ total
    return total


def broadcastable(rng):
    """delta (2, 3, 5, 1), A (3, 1, 7), B (2, 1, 5, 7)."""
    delta, A = rng.uniform(0.01, 1, (2, 3, 5, 1)), -rng.uniform(0.1, 4, (3, 1, 7))
    return delta, A, rng.normal(size=(2, 1, 5, 7))


def simpson(f, a, b, n=2000):
    """The integral of f from a to b; error below n^-4 for the smooth f used here."""
    s = np.linspace(a, b, n + 1)
    w = np.ones(n + 1)
    w[1:-1:2], w[2:-1:2] = 4, 2
    return (f(s) * w).sum() * (b - a) / n / 3


@pytest.mark.parametrize("z", [0.0, 1e-300, 1e-17, -1e-17, 1e-9, -1e-9, -1e-4, 0.3, -0.3, -1.0, -1.6, -5.0])
def test_phi_has_full_precision_at_every_size(z):
    assert abs(float(phi(z)) - series_phi(z)) <= 4 * EPS * series_phi(z)


@pytest.mark.parametrize("z", [1e-12j, 1e-7 + 1e-9j, -1e-5 - 1e-3j, -0.5 + 3j, 2j * np.pi])
def test_phi_complex_is_the_mean_of_the_exponential(z):
    want = simpson(lambda s: np.exp(s * z), 0.0, 1.0)
    assert abs(complex(phi(z)) - want) <= 1e-10 + 8 * EPS


def test_phi_far_from_zero():
    assert float(phi(-1000.0)) == pytest.approx(1e-3, rel=4 * EPS)
    assert float(phi(-np.inf)) == 0


def test_phi_float32_stays_float32_and_precise():
    z = -np.geomspace(1e-12, 10, 50).astype(np.float32)
    got = phi(z)
    assert got.dtype == np.float32
    want = phi(z.astype(float))
    assert np.abs(got / want - 1).max() <= 4 * np.finfo(np.float32).eps


def test_zoh_is_the_exact_step_for_a_held_input():
    """Against the integral itself: A_bar and B_bar reproduce h(t + delta) for x constant."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        delta, A, B, h, x = rng.uniform(0.01, 2), -rng.uniform(0.1, 4), *rng.normal(size=3)
        A_bar, B_bar = zoh(delta, A, B)
        want = np.exp(delta * A) * h + simpson(lambda s: np.exp((delta - s) * A) * B * x, 0, delta)  # noqa: B023
        assert A_bar * h + B_bar * x == pytest.approx(want, abs=1e-11)


def test_mamba_is_zoh_decay_with_the_euler_input():
    rng = np.random.default_rng(1)
    delta, A, B = broadcastable(rng)
    assert np.array_equal(mamba(delta, A, B)[0], zoh(delta, A, B)[0])
    assert np.array_equal(mamba(delta, A, B)[1], euler(delta, A, B)[1])


RATIOS = [(-1e-6, 1.0000005), (-0.1, 1.050833), (-1.0, 1.581977), (-1.6, 2.004753)]


@pytest.mark.parametrize("z, ratio", RATIOS)
def test_how_far_the_published_input_weight_is_from_zoh(z, ratio):
    got = mamba(1.0, z, 1.0)[1] / zoh(1.0, z, 1.0)[1]
    assert float(got) == pytest.approx(ratio, rel=1e-6)


def test_euler_and_bilinear_solve_their_difference_equations():
    rng = np.random.default_rng(2)
    delta, A, B, h, x = 0.3, -rng.uniform(0.5, 2) + 1.5j, *rng.normal(size=3)
    A_bar, B_bar = euler(delta, A, B)
    new = A_bar * h + B_bar * x
    assert abs((new - h) / delta - (A * h + B * x)) <= 32 * EPS
    A_bar, B_bar = bilinear(delta, A, B)
    new = A_bar * h + B_bar * x
    assert abs((new - h) / delta - (A * (h + new) / 2 + B * x)) <= 32 * EPS


@pytest.mark.parametrize("rule, order", [(euler, 1), (bilinear, 2), (mamba, 1)])
def test_global_order_for_a_held_input(rule, order):
    """Halve the step six times; the slope of log error in the finest half is the order, within 5 %."""
    A, B, x, end = -1.3, 0.7, 1.0, 2.0
    want = B * x * end * phi(A * end)
    steps = end / 2.0 ** np.arange(4, 11)
    error = []
    for step in steps:
        A_bar, B_bar = rule(step, A, B)
        h = 0.0
        for _ in range(round(end / step)):
            h = A_bar * h + B_bar * x
        error.append(abs(h - want))
    slope = np.polyfit(np.log(steps[3:]), np.log(error[3:]), 1)[0]
    assert slope == pytest.approx(order, rel=0.05)


@pytest.mark.parametrize("seqlen", SIZES)
def test_zoh_in_many_small_steps_equals_one_large_step(seqlen):
    A, B = np.array([-3.0, -0.2, -0.1 + 2j]), np.array([1.0, -2.0, 0.5j])
    A_bar, B_bar = zoh(1 / seqlen, A, B)
    h = np.zeros(3, complex)
    for _ in range(seqlen):
        h = A_bar * h + B_bar
    np.testing.assert_allclose(h, zoh(1.0, A, B)[1], rtol=0, atol=8 * (seqlen + 4) * EPS)


@pytest.mark.parametrize("rule, limit", [(euler, -np.inf), (bilinear, -1), (zoh, 0), (mamba, 0)])
def test_a_long_step(rule, limit):
    """Only the exponential forgets: as delta grows its A_bar goes to 0."""
    A_bar, _ = rule(1e12, -1.0, 1.0)
    assert A_bar < -1e11 if limit == -np.inf else abs(A_bar - limit) <= 1e-11


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_step_changes_nothing(rule):
    A_bar, B_bar = rule(0.0, np.array([-1.0, -16.0, -0.5 + 3j]), np.array([1.0, 2.0, 3.0]))
    assert np.array_equal(A_bar, np.ones(3))
    assert np.array_equal(B_bar, np.zeros(3))


@pytest.mark.parametrize("rule", RULES)
def test_an_integrator_adds_up(rule):
    """A = 0: every rule is h_t = h_{t-1} + delta B x_t."""
    A_bar, B_bar = rule(0.25, 0.0, 3.0)
    assert (A_bar, B_bar) == (1, 0.75)


@pytest.mark.parametrize("rule", RULES)
def test_broadcasting_agrees_with_one_at_a_time(rule):
    rng = np.random.default_rng(3)
    delta, A, B = broadcastable(rng)
    A_bar, B_bar = (np.broadcast_to(x, (2, 3, 5, 7)) for x in rule(delta, A, B))
    one = rule(delta[1, 2, 4, 0], A[2, 0, 6], B[1, 0, 4, 6])
    np.testing.assert_allclose([A_bar[1, 2, 4, 6], B_bar[1, 2, 4, 6]], one, rtol=4 * EPS)


def spring(damping):
    return np.array([[0.0, 1.0], [-1.0, -damping]]), np.array([0.0, 1.0])


@pytest.mark.parametrize("damping", [0.0, 0.3, 1.9, 2.1, 5.0])
@pytest.mark.parametrize("delta", [1e-3, 0.5, 4.0])
def test_dense_agrees_with_matrix_algebra(damping, delta):
    """The four rules of a mass on a spring, without eigenvectors: series and linear solves."""
    A, B = spring(damping)
    eye, half = np.eye(2), delta * A / 2
    decay = expm_taylor(delta * A)
    want = {
        euler: (eye + delta * A, delta * B),
        bilinear: (np.linalg.solve(eye - half, eye + half), np.linalg.solve(eye - half, delta * B)),
        zoh: (decay, np.linalg.solve(A, (decay - eye) @ B)),
        mamba: (decay, delta * B),
    }
    condition = np.linalg.cond(np.linalg.eig(A)[1]) * np.linalg.cond(A)
    for rule, expected in want.items():
        got = dense(rule, delta, A, B)
        for g, w in zip(got, expected, strict=True):
            assert np.isrealobj(g)
            assert g.shape == w.shape
            np.testing.assert_allclose(g, w, rtol=0, atol=64 * EPS * condition * max(1, np.abs(w).max()))


def test_dense_refuses_a_matrix_without_eigenvectors():
    A, B = spring(2.0)  # critically damped: one double eigenvalue, one eigenvector
    with pytest.raises(ValueError, match="A: its eigenvectors"):
        dense(zoh, 0.1, A, B)


def test_errors_name_the_arguments():
    with pytest.raises(ValueError, match=r"delta, A, B: shapes \(3,\), \(2,\), \(\)"):
        zoh(np.ones(3), np.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"A and B: got shapes \(2, 3\) and \(2,\)"):
        dense(zoh, 0.1, np.ones((2, 3)), np.ones(2))
