"""The synthetic tasks: a plain program finds every answer in the inputs, and chance places every token."""

import numpy as np
import pytest
import torch

from mamba_ref.tasks import induction_heads, selective_copying

TASKS = [
    (selective_copying, dict(seqlen=33, n_tokens=5, vocab_size=7)),
    (induction_heads, dict(seqlen=33, vocab_size=7)),
]


def rng(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("task, sizes", TASKS)
def test_one_seed_one_data_set(task, sizes):
    first, again, other = (task(rng(seed), 4, **sizes) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    generator = rng(1)
    assert torch.equal(task(generator, 4, **sizes)[0], first[0])
    assert not torch.equal(task(generator, 4, **sizes)[0], first[0])  # fresh data at every call


@pytest.mark.parametrize("task, sizes", TASKS)
def test_types_and_shapes(task, sizes):
    for batch in (0, 1, 3):
        inputs, targets, mask = task(rng(3), batch, **sizes)
        assert (inputs.dtype, targets.dtype, mask.dtype) == (torch.int64, torch.int64, torch.bool)
        assert inputs.shape == targets.shape == mask.shape
        assert len(inputs) == batch
    assert not targets[~mask].any()
    assert inputs.min() >= 0
    assert inputs.max() == sizes["vocab_size"] - 1


@pytest.mark.parametrize("seqlen, n_tokens, vocab_size", [(33, 5, 7), (4, 4, 3), (1, 1, 3), (100, 16, 16)])
def test_copying_asks_for_the_data_tokens_in_order(seqlen, n_tokens, vocab_size):
    inputs, targets, mask = selective_copying(rng(4), 50, seqlen, n_tokens, vocab_size)
    assert inputs.shape == (50, seqlen + n_tokens)
    for row, target, counts in zip(inputs.tolist(), targets.tolist(), mask.tolist(), strict=True):
        data = [token for token in row[:seqlen] if token != 0]
        assert len(data) == n_tokens
        assert all(1 <= token <= vocab_size - 2 for token in data)
        assert row[seqlen:] == [vocab_size - 1] * n_tokens
        assert target[seqlen:] == data
        assert counts == [False] * seqlen + [True] * n_tokens


def test_copying_places_and_draws_tokens_evenly():
    # Each of 20 positions is taken in half of 4000 rows, each of 5 data ids has a fifth of the tokens:
    # within 5 standard deviations.
    inputs, targets, mask = selective_copying(rng(5), 4000, 20, 10, 7)
    taken = (inputs[:, :20] != 0).sum(0)
    assert (taken - 2000).abs().max() < 5 * (4000 * 0.25) ** 0.5
    counts = torch.bincount(targets[mask], minlength=7)[1:6]
    assert counts.sum() == 40000
    assert (counts - 8000).abs().max() < 5 * (40000 * 0.2 * 0.8) ** 0.5
    gaps = (
        inputs[:, :20].ne(0).int().diff(dim=1).ne(0).sum(1)
    )  # a block of tokens in a row has 2 edges at most
    assert (gaps > 2).float().mean() > 0.9


def test_copying_defaults_are_the_papers():
    inputs, _, mask = selective_copying(rng(6), 2)
    assert inputs.shape == (2, 4096 + 16)
    assert inputs.max() == 15
    assert mask.sum(1).tolist() == [16, 16]


@pytest.mark.parametrize(
    "seqlen, vocab_size, max_prefix", [(33, 7, None), (3, 2, None), (256, 16, 10), (9, 4, 0)]
)
def test_induction_asks_for_the_token_after_the_first_special_one(seqlen, vocab_size, max_prefix):
    inputs, targets, mask = induction_heads(rng(7), 50, seqlen, vocab_size, max_prefix)
    assert inputs.shape == (50, seqlen)
    special = vocab_size - 1
    for row, target, counts in zip(inputs.tolist(), targets.tolist(), mask.tolist(), strict=True):
        first = row.index(special)
        assert [t for t, token in enumerate(row) if token == special] == [first, seqlen - 1]
        assert target[-1] == row[first + 1] != special
        assert first <= (seqlen - 3 if max_prefix is None else max_prefix)
        assert counts == [False] * (seqlen - 1) + [True]


def test_induction_places_and_draws_tokens_evenly():
    # 4000 rows over 10 places and over 6 ordinary tokens: within 5 standard deviations.
    for max_prefix, seqlen in ((None, 12), (9, 40)):
        inputs, targets, mask = induction_heads(rng(8), 4000, seqlen, 7, max_prefix)
        places = torch.bincount(inputs.eq(6).int().argmax(1), minlength=10)
        assert len(places) == 10
        assert (places - 400).abs().max() < 5 * (4000 * 0.1 * 0.9) ** 0.5
        answers = torch.bincount(targets[mask], minlength=6)
        assert len(answers) == 6
        assert (answers - 4000 / 6).abs().max() < 5 * (4000 * 5 / 36) ** 0.5


def test_induction_defaults_are_the_papers():
    inputs, _, _ = induction_heads(rng(9), 3)
    assert inputs.shape == (3, 256)
    assert inputs.max() == 15


@pytest.mark.parametrize(
    "task, wrong, name",
    [
        (selective_copying, dict(seqlen=4, n_tokens=5), "n_tokens: got 5"),
        (selective_copying, dict(n_tokens=0), "n_tokens: got 0"),
        (selective_copying, dict(vocab_size=2), "vocab_size: got 2"),
        (induction_heads, dict(seqlen=2), "seqlen: got 2"),
        (induction_heads, dict(vocab_size=1), "vocab_size: got 1"),
        (induction_heads, dict(seqlen=9, max_prefix=7), "max_prefix: got 7"),
        (induction_heads, dict(max_prefix=-1), "max_prefix: got -1"),
    ],
)
def test_errors_name_the_argument(task, wrong, name):
    with pytest.raises(ValueError, match=name):
        task(rng(10), 2, **wrong)
