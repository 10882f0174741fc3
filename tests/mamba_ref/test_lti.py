"""The recurrence, the kernel, both convolutions and the matrix are one map, to rounding."""

import numpy as np
import pytest

from mamba_ref import lti
from mamba_ref.selective_scan import selective_scan_numpy

EPS = np.finfo(float).eps
SIZES = (1, 2, 63, 64, 65, 100)


def relative(got, want):
    return np.linalg.norm(np.ravel(got - want)) / np.linalg.norm(np.ravel(want))


def system(rng, *shape, complex_modes=False):
    """A stable diagonal system; complex modes come in conjugate pairs."""
    if not complex_modes:
        return rng.uniform(-0.99, 0.99, shape), rng.normal(size=shape), rng.normal(size=shape)
    half = (*shape[:-1], shape[-1] // 2)
    modes = (
        rng.uniform(0.5, 0.99, half) * np.exp(1j * rng.uniform(0.1, 3, half)),
        rng.normal(size=half) + 1j * rng.normal(size=half),
        rng.normal(size=half) + 1j * rng.normal(size=half),
    )
    return tuple(np.concatenate([m, m.conj()], -1) for m in modes)


def fft_bound(K, u):
    """Relative error of a convolution by FFT of n = 2L points.

    One transform errs by at most 7 (eps/2) log2(n) in the 2-norm (radix-2, precise twiddles). Two
    forward transforms and a product give 2 |K| |u|, the inverse one |K|_1 |u|.
    """
    n = 2 * u.shape[-1]
    K = np.broadcast_to(K, u.shape)
    norm = np.linalg.norm
    size = np.linalg.norm((2 * norm(K, axis=-1) * np.sqrt(n) + np.abs(K).sum(-1)) * norm(u, axis=-1))
    return 7 * EPS / 2 * max(1, np.log2(n)) * size / norm(lti.convolution(K, u))


@pytest.mark.parametrize("complex_modes", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("seqlen", SIZES)
def test_all_forms_agree_on_one_channel(seqlen, complex_modes):
    rng = np.random.default_rng(seqlen)
    A_bar, B_bar, C = system(rng, 6, complex_modes=complex_modes)
    u = rng.normal(size=seqlen)
    bound = lti.rounding(A_bar, B_bar, C, u)
    y = lti.recurrence(A_bar, B_bar, C, u)
    K = lti.kernel(A_bar, B_bar, C, seqlen)
    assert y.shape == K.shape == (seqlen,)
    assert np.isrealobj(y)
    assert np.isrealobj(K)
    assert relative(lti.convolution(K, u), y) <= bound
    assert relative(lti.matrix(K) @ u, y) <= bound
    assert relative(lti.convolution(K, u, method="fft"), y) <= bound + fft_bound(K, u)


SHAPES = [(1, 1, 1, 1), (1, 3, 63, 5), (2, 5, 65, 7), (3, 2, 100, 1)]


@pytest.mark.parametrize("batch, d_inner, seqlen, d_state", SHAPES)
def test_all_forms_agree_on_many_channels(batch, d_inner, seqlen, d_state):
    rng = np.random.default_rng(seqlen)
    A_bar, B_bar, C = system(rng, d_inner, d_state)
    u = rng.normal(size=(batch, d_inner, seqlen))
    bound = lti.rounding(A_bar, B_bar, C, u)
    y = lti.recurrence(A_bar, B_bar, C, u)
    K = lti.kernel(A_bar, B_bar, C, seqlen)
    M = lti.matrix(K)
    assert y.shape == u.shape
    assert K.shape == (d_inner, seqlen)
    assert M.shape == (d_inner, seqlen, seqlen)
    assert relative(lti.convolution(K, u), y) <= bound
    assert relative(np.einsum("dts,bds->bdt", M, u), y) <= bound
    assert relative(lti.convolution(K, u, method="fft"), y) <= bound + fft_bound(K, u)
    alone = lti.recurrence(A_bar[-1], B_bar[-1], C[-1], u[0, -1])
    assert relative(alone, y[0, -1]) <= lti.rounding(A_bar[-1], B_bar[-1], C[-1], u[0, -1])


@pytest.mark.parametrize("batch, d_inner, seqlen, d_state", [(1, 1, 1, 1), (2, 3, 65, 5)])
def test_recurrence_is_the_selective_scan_with_nothing_selective(batch, d_inner, seqlen, d_state):
    """Constant delta, B and C in the oracle, output and every state."""
    rng = np.random.default_rng(7)
    u, B, C = rng.normal(size=(batch, d_inner, seqlen)), *rng.normal(size=(2, d_inner, d_state))
    A, step = -rng.uniform(0.1, 2, (d_inner, d_state)), rng.uniform(0.01, 1, d_inner)
    delta = np.broadcast_to(step[:, None], u.shape)
    want, states = selective_scan_numpy(u, delta, A, B, C, return_states=True)
    A_bar, B_bar = np.exp(step[:, None] * A), step[:, None] * B
    y, h = lti.recurrence(A_bar, B_bar, C, u, return_states=True)
    assert relative(y, want) <= lti.rounding(A_bar, B_bar, C, u)
    assert h.shape == states.shape
    assert relative(h, states) <= (seqlen + 4) * 4 * EPS * np.linalg.norm(
        lti.recurrence(A_bar, np.abs(B_bar), C, np.abs(u), return_states=True)[1]
    ) / np.linalg.norm(states)  # fmt: skip


def test_kernel_is_the_response_to_an_impulse():
    rng = np.random.default_rng(8)
    A_bar, B_bar, C = system(rng, 3, 4, complex_modes=True)
    impulse = np.zeros((3, 33))
    impulse[:, 0] = 1
    want = lti.recurrence(A_bar, B_bar, C, impulse)
    assert relative(lti.kernel(A_bar, B_bar, C, 33), want) <= lti.rounding(A_bar, B_bar, C, impulse)


def test_kernel_of_a_dead_mode_is_one_tap():
    assert np.array_equal(lti.kernel([0.0], [2.0], [3.0], 4), [6, 0, 0, 0])


def test_kernel_by_hand():
    """Powers of two are exact: K_t = 3 (1/2)^t - (-1/4)^t."""
    K = lti.kernel([0.5, -0.25], [1.0, 1.0], [3.0, -1.0], 4)
    assert np.array_equal(K, [2, 1.75, 0.6875, 0.390625])
    want = [[2, 0, 0, 0], [1.75, 2, 0, 0], [0.6875, 1.75, 2, 0], [0.390625, 0.6875, 1.75, 2]]
    assert np.array_equal(lti.matrix(K), want)
    assert np.array_equal(lti.convolution(K, [1.0, 0.0, -2.0, 4.0]), [2, 1.75, -3.3125, 4.890625])


@pytest.mark.parametrize("cut", [0, 1, 31, 63])
def test_a_sequence_continues_from_its_state(cut):
    rng = np.random.default_rng(9)
    A_bar, B_bar, C = system(rng, 2, 5)
    u = rng.normal(size=(3, 2, 63))
    y, h = lti.recurrence(A_bar, B_bar, C, u, return_states=True)
    first, h_first = lti.recurrence(A_bar, B_bar, C, u[..., :cut], return_states=True)
    state = h_first[..., -1, :] if cut else np.zeros((3, 2, 5))
    second, h_second = lti.recurrence(A_bar, B_bar, C, u[..., cut:], initial_state=state, return_states=True)
    assert np.array_equal(np.concatenate([first, second], -1), y)
    assert np.array_equal(np.concatenate([h_first, h_second], -2), h)


def test_the_past_does_not_see_the_future_and_time_has_no_origin():
    rng = np.random.default_rng(10)
    A_bar, B_bar, C = system(rng, 5)
    u = rng.normal(size=65)
    y = lti.recurrence(A_bar, B_bar, C, u)
    changed = u.copy()
    changed[40] += 1
    assert np.array_equal(lti.recurrence(A_bar, B_bar, C, changed)[:40], y[:40])
    later = lti.recurrence(A_bar, B_bar, C, np.concatenate([np.zeros(3), u]))
    assert np.array_equal(later[3:], y)


def test_fft_without_padding_would_wrap():
    """The padding matters: the last input reaches no earlier output."""
    u = np.zeros(8)
    u[-1] = 1
    y = lti.convolution(np.ones(8), u, method="fft")
    assert np.abs(y - u).max() <= 64 * EPS


def test_rounding_bound_is_tight_enough_to_see_a_changed_digit():
    """A relative change of 1e-9 in one decay is far above the bound."""
    rng = np.random.default_rng(11)
    A_bar, B_bar, C = system(rng, 6)
    u = rng.normal(size=65)
    y = lti.recurrence(A_bar, B_bar, C, u)
    A_bar = A_bar.copy()
    A_bar[np.argmax(np.abs(A_bar))] *= 1 + 1e-9
    assert relative(lti.recurrence(A_bar, B_bar, C, u), y) > 10 * lti.rounding(A_bar, B_bar, C, u)


def test_empty_sequence():
    A_bar, B_bar, C = np.ones((3, 2, 5))
    u = np.zeros((4, 2, 0))
    y, h = lti.recurrence(A_bar, B_bar, C, u, return_states=True)
    assert y.shape == (4, 2, 0)
    assert h.shape == (4, 2, 0, 5)
    K = lti.kernel(A_bar, B_bar, C, 0)
    assert K.shape == (2, 0)
    for method in ("direct", "fft"):
        assert lti.convolution(K, u, method=method).shape == (4, 2, 0)
    assert lti.matrix(K).shape == (2, 0, 0)


def test_errors_name_the_argument():
    one, u = np.ones(3), np.ones(5)
    with pytest.raises(ValueError, match=r"B_bar: got shape \(2,\)"):
        lti.kernel(one, np.ones(2), one, 5)
    with pytest.raises(ValueError, match=r"C: got shape \(\)"):
        lti.recurrence(one, one, 1.0, u)
    with pytest.raises(ValueError, match=r"u: got shape \(5,\) beside a system \(2, 3\)"):
        lti.recurrence(np.ones((2, 3)), one, one, u)
    with pytest.raises(ValueError, match=r"u: got shape \(4, 5\) beside a system \(2, 3\)"):
        lti.recurrence(np.ones((2, 3)), one, one, np.ones((4, 5)))
    with pytest.raises(ValueError, match="K: got 4 taps for u of length 5"):
        lti.convolution(np.ones(4), u)
    with pytest.raises(ValueError, match="method: got 'circular'"):
        lti.convolution(u, u, method="circular")
