"""Sampling is a distribution: drawn tokens against exact probabilities, worked out here by sorting lists."""

import math

import pytest
import torch

from mamba_fast.ops.next_token.torch_next import penalise
from mamba_fast.sampling import check_sampling, draw, filtered, sample

DRAWS = 40_000
CASES = {
    "everything": {},
    "temperature": dict(temperature=0.6),
    "top-k": dict(top_k=5),
    "top-p": dict(top_p=0.8),
    "min-p": dict(min_p=0.15),
    "min-p and temperature": dict(min_p=0.15, temperature=2.5),
    "min-p and top-k": dict(top_k=7, min_p=0.2),
    "min-p and top-p": dict(top_p=0.7, min_p=0.05),
    "all of them": dict(top_k=9, top_p=0.75, min_p=0.05, temperature=1.7),
}


def exact(logits, top_k=0, top_p=None, min_p=None, temperature=1.0):
    """{token: probability} of one row, in the documented order, in Python floats."""
    left = sorted(enumerate(logits.tolist()), key=lambda pair: -pair[1])[: top_k or None]
    if min_p is not None:
        highest = math.exp(left[0][1])
        left = [(i, x) for i, x in left if math.exp(x) >= min_p * highest]
    weights = [(i, math.exp(x / temperature)) for i, x in left]
    total = sum(w for _, w in weights)
    kept, held = {}, 0.0
    for i, w in weights:
        if top_p is None or held < top_p:
            kept[i] = w / total
        held += w / total
    return {i: p / sum(kept.values()) for i, p in kept.items()}


def p_value(counts, probabilities):
    """Of Pearson's chi-square: rows of `counts` and `probabilities`, each (tokens,)."""
    want = probabilities * counts.sum()
    statistic = ((counts - want) ** 2 / want).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def fresh_logits(seed, rows=2, tokens=24):
    return torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed)) * 1.5


@pytest.mark.parametrize("filters", CASES.values(), ids=CASES)
def test_what_is_left_to_choose_from_is_exact(filters):
    logits = fresh_logits(1, 4)
    scores, tokens = filtered(logits, **filters)
    if tokens is None:
        tokens = torch.arange(logits.shape[1]).expand(4, -1)
    probability = torch.zeros(4, logits.shape[1]).scatter(1, tokens, scores.softmax(-1))
    for row, got in zip(logits, probability, strict=True):
        want = exact(row, **filters)
        assert set(want) == set(got.nonzero()[:, 0].tolist())
        for i, p in want.items():
            assert got[i].item() == pytest.approx(p, rel=50 * 2**-24)


@pytest.mark.parametrize("filters", CASES.values(), ids=CASES)
def test_tokens_are_drawn_with_the_filtered_probabilities(filters):
    """Pearson's chi-square; a wrong order of the filters, or one that acts on the wrong row, is far out."""
    logits = fresh_logits(2)
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(DRAWS, generator=generator, dtype=torch.float64)
    for row in logits:
        # As one batch, between rows of another distribution: nothing may come from row 0.
        batch = torch.stack([-row, row]).repeat(DRAWS // 2, 1)
        drawn = sample(batch, uniform, **({"top_k": 0} | filters))[1::2]
        want = exact(row, **filters)
        assert set(drawn.tolist()) <= set(want)
        order = sorted(want)
        counts = torch.bincount(drawn, minlength=len(row))[order].double()
        assert p_value(counts, torch.tensor([want[i] for i in order]).double()) > 1e-4


def test_the_chi_square_notices_a_wrong_temperature():
    row = fresh_logits(4)[0]
    drawn = torch.multinomial(
        (row / 1.05).softmax(-1), DRAWS, True, generator=torch.Generator().manual_seed(5)
    )
    counts = torch.bincount(drawn, minlength=len(row)).double()
    assert p_value(counts, row.double().softmax(-1)) < 1e-4
    assert p_value(counts, (row.double() / 1.05).softmax(-1)) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_and_its_limits(dtype):
    logits = fresh_logits(6, 5).to(dtype)
    want = logits.float().argmax(-1)
    uniform = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sample(logits), want)
    for filters in (dict(top_k=2, top_p=1e-6), dict(top_k=0, min_p=1.0), dict(top_k=0, top_p=1e-6)):
        assert torch.equal(sample(logits, uniform, **filters), want)
    cold = sample(logits.float(), uniform, top_k=0, temperature=1e-4)
    assert torch.equal(cold, want)


def test_what_is_not_left_is_never_drawn():
    """At both ends of the interval, with columns of probability 0 on all sides."""
    inf = math.inf
    scores = torch.tensor([[-inf, 0.0, -inf, -200.0, 1.0, -inf]])
    below = 1 - 2.0**-53  # the largest float64 that torch.rand returns
    ends = torch.tensor([0.0, below, below / (1 + math.e)], dtype=torch.float64)
    assert draw(scores.expand(3, -1), ends).tolist() == [1, 4, 1]


def test_a_filter_takes_a_tensor_as_its_number():
    logits, filters = fresh_logits(8), dict(top_p=0.7, min_p=0.05, temperature=1.3)
    want, _ = filtered(logits, **filters)
    got, _ = filtered(logits, **{k: torch.tensor(v) for k, v in filters.items()})
    assert torch.equal(got, want)
    given = logits.clone()
    filtered(logits, **filters)
    assert torch.equal(logits, given)  # nothing is changed in place


def test_penalty():
    logits = torch.tensor([[2.0, -2.0, 0.5, -0.5], [3.0, 1.0, -1.0, 0.0]])
    seen = torch.tensor([[True, True, False, False], [False, True, True, True]])
    want = torch.tensor([[1.0, -4.0, 0.5, -0.5], [3.0, 0.5, -2.0, 0.0]])
    assert torch.equal(penalise(logits, seen, 2.0), want)
    half = penalise(logits.half(), seen, torch.tensor(2.0))
    assert half.dtype == torch.float16
    assert torch.equal(half.float(), want)


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("top_k", -1, "integer of at least 0"),
        ("top_k", 1.5, "integer of at least 0"),
        ("top_p", 1.1, "from 0 to 1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("temperature", 0.0, "a positive number"),
        ("temperature", math.nan, "a positive number"),
        ("repetition_penalty", -1.0, "a positive number"),
    ],
)
def test_a_number_out_of_range_is_named(name, value, expected):
    right = dict(top_k=5, top_p=0.0, min_p=0.0, temperature=1.0, repetition_penalty=1.0)
    check_sampling(**right)
    with pytest.raises(ValueError, match=f"{name}: expected an? .*{expected.removeprefix('a ')}"):
        check_sampling(**(right | {name: value}))
