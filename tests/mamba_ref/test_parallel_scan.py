"""The operator is associative to a few roundings; four algorithms give the exact scan at the counted cost."""

from fractions import Fraction
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_ref.checks import errors
from mamba_ref.parallel_scan import (
    ALGORITHMS,
    IDENTITY,
    Segments,
    blelloch,
    chunked,
    combine,
    hillis_steele,
    selective_scan_parallel,
    sequential,
)
from mamba_ref.selective_scan import selective_scan_numpy

U = 2.0**-53  # unit roundoff of float64
TINY = 2.0**-1074  # and the absolute error of one product that underflows
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
decay = st.floats(-1, 1, allow_subnormal=False)
value = st.floats(-1e3, 1e3, allow_subnormal=False)
pair = st.tuples(decay, value)


def gamma(roundings, u=U):
    """The relative error that so many roundings in a row can make: n u / (1 - n u)."""
    return roundings * u / (1 - roundings * u)


@settings(max_examples=300, deadline=None)
@given(pair, pair, pair)
def test_operator_is_associative_within_ten_roundings(first, second, third):
    # In both groupings each of the three terms of b passes through at most four roundings, and a
    # through two; a fifth on each side covers the rounding of `size` itself.
    got = combine(combine(first, second), third)
    want = combine(first, combine(second, third))
    (a_1, b_1), (a_2, b_2), (a_3, b_3) = first, second, third
    sizes = abs(a_1 * a_2 * a_3), abs(a_3 * a_2 * b_1) + abs(a_3 * b_2) + abs(b_3)
    for g, w, size in zip(got, want, sizes, strict=True):
        assert abs(g - w) <= 2 * gamma(5) * size + 2e3 * 8 * TINY


@given(pair)
def test_identity_changes_no_bit_on_either_side(x):
    assert combine(IDENTITY, x) == x
    assert combine(x, IDENTITY) == x


def test_operator_is_not_commutative():
    assert combine((0.5, 1.0), (0.0, 3.0)) == (0.0, 3.0)
    assert combine((0.0, 3.0), (0.5, 1.0)) == (0.0, 2.5)


def exact_scan(a, b):
    """h in rational arithmetic, and the scan of |a|, |b| that scales its rounding errors."""
    h, size, hs, sizes = Fraction(0), Fraction(0), [], []
    for a_t, b_t in zip(a.tolist(), b.tolist(), strict=True):
        h = Fraction(a_t) * h + Fraction(b_t)
        size = abs(Fraction(a_t)) * size + abs(Fraction(b_t))
        hs.append(h)
        sizes.append(size)
    return hs, sizes


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]), st.data())
def test_all_algorithms_agree_with_exact_arithmetic(seqlen, seed, dtype, data):
    rng = np.random.default_rng(seed)
    scale = data.draw(st.sampled_from([0.0, 0.1, 1.0]))  # slow decay, a mixture, and hard resets
    a = (1 - scale * rng.uniform(0, 2, seqlen)).astype(dtype)
    b = rng.normal(size=seqlen).astype(dtype)
    a[rng.random(seqlen) < 0.1 * scale] = 0
    exact, sizes = exact_scan(a, b)
    info = np.finfo(dtype)
    for algorithm in ALGORITHMS.values():
        h, counts = algorithm(a, b)
        assert h.dtype == dtype
        # A term a_t ... a_{s+1} b_s meets t - s products whatever the grouping, and one sum a link.
        # A product that underflows adds at most the smallest number, times a |b| that is below 8.
        rel = gamma(seqlen + counts.depth, float(info.eps) / 2)
        underflow = 8 * seqlen**2 * Fraction(float(info.smallest_subnormal))
        for got, want, size in zip(h.tolist(), exact, sizes, strict=True):
            assert abs(Fraction(got) - want) <= Fraction(rel) * size + underflow


@every_algorithm
@pytest.mark.parametrize("seqlen", [0, 1, 2, 63, 64, 65, 100])
def test_leading_axes_are_scanned_alone(algorithm, seqlen):
    rng = np.random.default_rng(seqlen)
    a, b = rng.uniform(0, 1, (2, 3, seqlen)), rng.normal(size=(2, 3, seqlen))
    before = a.copy(), b.copy()
    h, _ = algorithm(a, b)
    for i in np.ndindex(2, 3):
        assert np.array_equal(h[i], algorithm(a[i], b[i])[0])
    assert np.array_equal(a, before[0])
    assert np.array_equal(b, before[1])


@every_algorithm
def test_a_nan_stays_in_its_row_and_its_future(algorithm):
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.1, 1, (2, 37)), rng.normal(size=(2, 37))
    clean, _ = algorithm(a, b)
    b[0, 20] = np.nan
    h, _ = algorithm(a, b)
    assert np.array_equal(h[0, :20], clean[0, :20])
    assert np.isnan(h[0, 20:]).all()
    assert np.array_equal(h[1], clean[1])


@pytest.mark.parametrize("seqlen", [*range(1, 35), 63, 64, 65, 100, 128, 1000])
def test_counts_are_what_the_formulas_say(seqlen):
    rng = np.random.default_rng(seqlen)
    a, b = rng.uniform(0, 1, seqlen), rng.normal(size=seqlen)
    m, lower = ceil(log2(seqlen)), int(log2(seqlen))
    work_depth = {name: (c.work, c.depth) for name, f in ALGORITHMS.items() for c in [f(a, b)[1]]}
    assert work_depth["sequential"] == (seqlen - 1, seqlen - 1)
    assert work_depth["hillis_steele"] == (m * seqlen - (2**m - 1), m)
    work, depth = work_depth["blelloch"]
    assert work == 2 * seqlen - 1 - lower - seqlen.bit_count()
    assert depth == (2 * m - 2 if m >= 2 else m) if seqlen == 2**m else m <= depth <= 2 * lower
    for chunk in {1, 2, 3, 8, seqlen, seqlen + 1}:
        counts = chunked(a, b, chunk)[1]
        c = min(chunk, seqlen)
        n = ceil(seqlen / c)
        assert (counts.work, counts.depth) == (2 * seqlen - c - n, c + n - 2)
    assert work_depth["chunked"][1] <= 2 * np.sqrt(seqlen) + 1


@every_algorithm
def test_trace_names_every_application(algorithm):
    rng = np.random.default_rng(2)
    _, counts = algorithm(rng.uniform(0, 1, 21), rng.normal(size=21))
    start, middle, stop, depth = counts.trace.T
    assert len(counts.trace) == counts.work
    assert depth.max() == counts.depth
    assert ((start < middle) & (middle < stop)).all()
    assert (depth >= np.ceil(np.log2(stop - start))).all()
    assert set(stop[start == 0]) == set(range(2, 22))  # every prefix but the first token's is made


@pytest.mark.parametrize("chunk", [1, 2, 7, 31, 64, 65, 1000])
def test_chunk_length_does_not_change_the_result(chunk):
    rng = np.random.default_rng(3)
    a, b = rng.uniform(0, 1, (3, 65)), rng.normal(size=(3, 65))
    want, _ = sequential(a, b)
    size, _ = sequential(a, abs(b))
    assert (abs(chunked(a, b, chunk)[0] - want) <= 2 * gamma(2 * 65) * size).all()


def test_only_neighbours_may_be_joined():
    segments = Segments(np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match="not commutative"):
        segments.join([1], [0])
    with pytest.raises(ValueError, match="not commutative"):
        segments.join([0], [2])
    segments.join([0], [1])
    with pytest.raises(ValueError, match="not finished"):
        segments.result()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"a, b: got shapes \(3,\) and \(4,\)"):
        blelloch(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="a, b"):
        hillis_steele(1.0, 2.0)
    with pytest.raises(ValueError, match="chunk: got 0"):
        chunked(np.ones(3), np.ones(3), chunk=0)


CASES = ["plain", "options", "constant", "grouped", "complex", "seq_idx", "cu_seqlens"]


def inputs(case, batch=2, d_inner=3, seqlen=65, d_state=5):
    rng = np.random.default_rng(4)
    args = {
        "u": rng.normal(size=(batch, d_inner, seqlen)),
        "delta": rng.uniform(0.01, 0.5, (batch, d_inner, seqlen)),
        "A": -rng.uniform(0.2, 2, (d_inner, d_state)),
        "B": rng.normal(size=(batch, d_state, seqlen)),
        "C": rng.normal(size=(batch, d_state, seqlen)),
    }
    if case == "complex":
        args["A"] = args["A"] + 1j * rng.normal(size=args["A"].shape)
        args["B"], args["C"] = (rng.normal(size=(batch, d_state, 2 * seqlen)) for _ in "BC")
    if case == "constant":
        args["B"], args["C"] = (rng.normal(size=(d_inner, d_state)) for _ in "BC")
    if case == "grouped":
        args["B"], args["C"] = (rng.normal(size=(batch, d_inner, d_state, seqlen)) for _ in "BC")
    if case in ("options", "seq_idx", "cu_seqlens"):
        args |= {"D": rng.normal(size=d_inner), "z": rng.normal(size=args["u"].shape), "delta_softplus": True}
        args |= {
            "delta_bias": rng.normal(size=d_inner),
            "initial_state": rng.normal(size=(batch, d_inner, d_state)),
        }
        args["delta"] = 2 * rng.normal(size=args["u"].shape)
        args["delta"][0, 0, -1] = 25  # above the threshold where softplus becomes the identity
    if case == "seq_idx":
        args["seq_idx"] = np.sort(rng.integers(0, 4, (batch, seqlen)), axis=1)
    if case == "cu_seqlens":
        args["cu_seqlens"] = np.array([0, seqlen // 2, seqlen // 2, seqlen - 1, seqlen])  # one is empty
        args["initial_state"] = rng.normal(size=(4, d_inner, d_state))
    return args


@every_algorithm
@pytest.mark.parametrize("seqlen", [1, 2, 65])
@pytest.mark.parametrize(
    "case", ["plain", "options", "constant", "grouped", "complex", "seq_idx", "cu_seqlens"]
)
def test_every_algorithm_is_the_selective_scan(algorithm, case, seqlen):
    args = inputs(case, batch=1 if case == "cu_seqlens" else 2, seqlen=seqlen)
    want = selective_scan_numpy(**args, return_last_state=True)
    got = selective_scan_parallel(**args, return_last_state=True, algorithm=algorithm)
    sizes = selective_scan_numpy(**absolute(args), return_last_state=True)
    # 2 L roundings for the scan, N + 4 for the sum over states, D u and the gate; complex products cost 4.
    rel = 2 * gamma((2 * seqlen + args["A"].shape[1] + 4) * (4 if case == "complex" else 1))
    for g, w, size in zip(got, want, sizes, strict=True):
        assert errors(g, w)[1] <= rel * np.linalg.norm(size) / np.linalg.norm(w)


def absolute(args):
    """The same scan with nothing to cancel: its result bounds the sum of all terms' sizes."""
    size = {k: abs(v) if k in ("u", "B", "C", "D", "initial_state") else v for k, v in args.items()}
    if np.iscomplexobj(args["A"]):
        size["A"] = args["A"].real
        for name in "BC":
            pairs = args[name].reshape(*args[name].shape[:-1], -1, 2)
            size[name] = 2 * np.linalg.norm(pairs, axis=-1)
    return size


@every_algorithm
def test_length_zero_returns_the_state_unchanged(algorithm):
    args = inputs("plain", seqlen=0) | {"initial_state": np.ones((2, 3, 5))}
    y, last_state = selective_scan_parallel(**args, return_last_state=True, algorithm=algorithm)
    assert y.shape == (2, 3, 0)
    assert np.array_equal(last_state, np.ones((2, 3, 5)))
