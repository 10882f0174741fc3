"""The tasks drawn on the device have the form of the reference's, and one position always the same rows."""

import numpy as np
import pytest
import torch

from mamba_fast.train import induction_heads, load_config, selective_copying
from mamba_fast.train.config import DATA
from mamba_fast.train.tasks import IGNORED
from mamba_ref import tasks as reference

TASKS = [
    ("induction_heads", dict(seqlen=33, vocab_size=7)),
    ("induction_heads", dict(seqlen=3, vocab_size=2)),
    ("induction_heads", dict(seqlen=40, vocab_size=16, max_prefix=9)),
    ("selective_copying", dict(seqlen=33, n_tokens=5, vocab_size=7)),
    ("selective_copying", dict(seqlen=4, n_tokens=4, vocab_size=3)),
]
OURS = {"induction_heads": induction_heads, "selective_copying": selective_copying}


def generator(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def labels_by_hand(name, ids, sizes):
    """What a plain program answers, token by token, None where no answer is asked for."""
    marker = sizes["vocab_size"] - 1
    if name == "induction_heads":
        return [None] * (len(ids) - 1) + [ids[ids.index(marker) + 1]]
    data = [token for token in ids[: sizes["seqlen"]] if token != 0]
    return [None] * sizes["seqlen"] + data


@pytest.mark.parametrize("name, sizes", TASKS)
def test_form_is_that_of_the_reference(name, sizes):
    ids, targets, mask = getattr(reference, name)(np.random.default_rng(0), 200, **sizes)
    theirs = ids, targets.masked_fill(~mask, IGNORED)
    ours = OURS[name](200, **sizes, generator=generator(0))
    for got_ids, got_labels in (theirs, (ours.input_ids, ours.labels)):
        assert (got_ids.dtype, got_labels.dtype) == (torch.int64, torch.int64)
        assert got_ids.shape == got_labels.shape == ids.shape
        for row, labels in zip(got_ids.tolist(), got_labels.tolist(), strict=True):
            want = labels_by_hand(name, row, sizes)
            assert [None if v == IGNORED else v for v in labels] == want
            markers = [t for t, token in enumerate(row) if token == sizes["vocab_size"] - 1]
            assert len(markers) == (2 if name == "induction_heads" else sizes["n_tokens"])
    assert ours.last == mask[0].sum()
    assert ours.seq_idx is None


@pytest.mark.parametrize("name, sizes", TASKS)
def test_tokens_and_places_are_as_frequent_as_in_the_reference(name, sizes):
    """Counts of each token at each position, in 4000 rows: two samples of one law, within 6 deviations."""
    rows = 4000
    ids, _, _ = getattr(reference, name)(np.random.default_rng(1), rows, **sizes)
    ours = OURS[name](rows, **sizes, generator=generator(1)).input_ids
    a, b = (torch.nn.functional.one_hot(v, sizes["vocab_size"]).sum(0).double() for v in (ids, ours))
    deviation = (2 * rows * ((a + b) / (2 * rows)) * (1 - (a + b) / (2 * rows))).sqrt()
    assert ((a - b).abs() <= 6 * deviation + 1e-9).all()


def test_defaults_are_the_papers():
    ids = induction_heads(2).input_ids
    assert (ids.shape, int(ids.max())) == ((2, 256), 15)
    batch = selective_copying(2)
    assert batch.input_ids.shape == (2, 4096 + 16)
    assert (int(batch.input_ids.max()), batch.last) == (15, 16)


@pytest.mark.parametrize(
    "task, wrong, name",
    [
        (selective_copying, dict(seqlen=4, n_tokens=5), "n_tokens: got 5"),
        (selective_copying, dict(vocab_size=2), "vocab_size: got 2"),
        (induction_heads, dict(seqlen=2), "seqlen: got 2"),
        (induction_heads, dict(vocab_size=1), "vocab_size: got 1"),
        (induction_heads, dict(seqlen=9, max_prefix=7), "max_prefix: got 7"),
    ],
)
def test_errors_name_the_argument(task, wrong, name):
    with pytest.raises(ValueError, match=name):
        task(2, **wrong)


@pytest.mark.parametrize("task", ["induction", "copying"])
def test_a_position_has_the_same_rows_whenever_it_is_drawn(task):
    settings = {"task": task, "seqlen": 40, "batch_size": 4, "device": "cpu"}

    def data(seed):
        config = load_config(None, settings | {"seed": seed})
        return DATA[task](config, **config.data)

    def at(position, source):
        source.seek(position)
        return [source.next().input_ids for _ in range(2)]

    first, again, other = data(5), data(5), data(6)
    late = at(2**40, first)
    assert all(torch.equal(a, b) for a, b in zip(at(2**40, again), late, strict=True))
    assert not torch.equal(*late)
    assert not torch.equal(at(2**40, other)[0], late[0])
    assert not torch.equal(at(0, first)[0], late[0])
    held_out = [b.input_ids for b in first.validation(3)]
    assert all(torch.equal(a, b.input_ids) for a, b in zip(held_out, again.validation(3), strict=True))
    assert not torch.equal(held_out[0], held_out[1])
    assert not torch.equal(held_out[0], at(0, first)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name, sizes", TASKS)
def test_rows_are_drawn_on_the_gpu(name, sizes):
    batch = OURS[name](50, **sizes, generator=generator(2, "cuda"), device="cuda")
    assert batch.input_ids.is_cuda
    assert batch.labels.is_cuda
    for row, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        assert [None if v == IGNORED else v for v in labels] == labels_by_hand(name, row, sizes)
