"""The standard library as text, what n-grams and compressors make of it, and a loop that trains on it."""

import collections
import math
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba_ref import MambaLM
from mamba_ref.byte_text import HELD_OUT, bits, bytes_of, compressed, fit, ngram_bits, standard_library


def as_bytes(text):
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def test_the_library_of_this_python_in_two_parts():
    train, test = standard_library()
    assert {"argparse.py", "json/decoder.py"} <= set(train | test)
    assert not set(train) & set(test)
    assert list(train) == sorted(train)
    assert len(train) / len(test) == pytest.approx(HELD_OUT - 1, rel=0.4)
    assert (train | test)["textwrap.py"] == Path(textwrap.__file__).read_bytes()
    assert len(bytes_of(train)) == sum(map(len, train.values())) > 1_000_000
    assert not any("test" in name.split("/")[:-1] or "_sysconfigdata" in name for name in train | test)


def test_a_file_is_held_out_by_its_name(tmp_path):
    for k in range(200):
        (tmp_path / f"m{k}.py").write_text(f"x = {k}\n")
    (tmp_path / "json" / "test").mkdir(parents=True)
    (tmp_path / "json" / "test" / "test_json.py").write_text("never read")
    (tmp_path / "json" / "decoder.py").write_text("read")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("never read")
    before = standard_library(tmp_path)
    assert sum(map(len, before)) == 201
    assert (before[0] | before[1])["json/decoder.py"] == b"read"
    (tmp_path / "m0.py").write_text("another version of it")
    (tmp_path / "more.py").write_text("and a new module")
    for old, new in zip(before, standard_library(tmp_path), strict=True):
        assert set(old) == set(new) - {"more.py"}


def test_a_folder_without_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"folder: {tmp_path} holds no source"):
        standard_library(tmp_path)


def witten_bell(train, history, byte, order):
    """The formula, word by word, with a counter."""
    if order < 0:
        return 1 / 256
    word = (bytes(order) + history)[len(history) :]
    padded = bytes(order) + train
    after = collections.Counter(padded[i + order] for i in range(len(train)) if padded[i : i + order] == word)
    less = witten_bell(train, history, byte, order - 1)
    total, kinds = sum(after.values()), len(after)
    return (after[byte] + kinds * less) / (total + kinds) if total else less


def test_ngrams_are_the_formula():
    rng = np.random.default_rng(0)
    letters, chances = [0, 1, 2, 97, 255], [0.1, 0.2, 0.1, 0.4, 0.2]
    train, test = (bytes(rng.choice(letters, size, p=chances).tolist()) for size in (90, 40))
    found = ngram_bits(as_bytes(train), as_bytes(test), 3)
    assert found.shape == (4, 40)
    for order in range(4):
        want = [-math.log2(witten_bell(train, test[:t], test[t], order)) for t in range(40)]
        assert found[order] == pytest.approx(want, rel=1e-12)


def test_ngrams_are_a_distribution():
    train = as_bytes(b"abracadabra " * 5)
    prefix = b"abr"
    p = [2.0 ** -ngram_bits(train, as_bytes(prefix + bytes([c])), 2)[:, -1] for c in range(256)]
    assert np.sum(p, 0) == pytest.approx([1, 1, 1])


def test_compressors_are_told_in_bits_per_byte():
    rng = np.random.default_rng(1)
    noise = compressed(torch.from_numpy(rng.integers(0, 256, 20_000, dtype=np.uint8)))
    letters = compressed(torch.from_numpy(rng.integers(0, 4, 20_000, dtype=np.uint8)))
    for name in ("zlib", "lzma"):
        assert 8 <= noise[name] < 8.1
        assert 2 <= letters[name] < 2.6


def test_bits_of_logits():
    logits = torch.randn(2, 3, 5)
    ids = torch.tensor([[0, 4, 2], [1, 1, 3]])
    want = -torch.log2(torch.softmax(logits, -1).gather(-1, ids[..., None])[..., 0])
    assert torch.allclose(bits(logits, ids), want)
    assert torch.allclose(bits(logits[0], ids[0]), want[0])


def test_training_learns_and_a_seed_repeats_it():
    text = as_bytes(b"the cat sat on the mat. " * 40)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = MambaLM(8, 1, 128, d_state=4)
        groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
        runs.append(fit(model, groups, text, 24, batch=4, seqlen=12, lr=2e-2, seed=seed, progress=False))
        assert groups[0]["params"][0].grad is not None
    assert runs[0].shape == (24,)
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    assert runs[0][0] == pytest.approx(7, abs=0.5)  # 128 ids, nothing known yet
    assert runs[0][-5:].mean() < 5
