"""Texts as rows: nothing lost, nothing twice, no document seen from another, an order by the seed."""

import hashlib

import numpy as np
import pytest
import torch
from train_inputs import write_texts

from mamba_fast import MambaConfig, MambaLMHeadModel
from mamba_fast.train import DataError, Objective, TextData
from mamba_fast.train.data import Rows, corpus_of
from mamba_fast.train.tasks import IGNORED
from mamba_ref.checks import bound, check

LENGTH = 16


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts", seed=3)


@pytest.fixture
def corpus(tmp_path, texts):
    return corpus_of(tmp_path / "texts", cache=tmp_path / "cache")


def documents(corpus):
    return np.split(np.asarray(corpus.tokens), corpus.ends[:-1])


def text_data(corpus, seed=0, validation=0.25, batch_size=3):
    return TextData(corpus, batch_size, LENGTH, seed, "cpu", validation)


def test_documents_are_the_bytes_of_the_files(corpus, texts, tmp_path):
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert [d.tobytes() for d in documents(corpus)] == [texts[name] for name in order]
    assert isinstance(corpus.tokens, np.memmap)
    assert (corpus.tokens.dtype, corpus.vocab_size) == (np.uint8, 256)
    assert list((tmp_path / "cache").rglob("*.tmp")) == []


def test_tokens_are_those_of_a_tokenizers_file(tmp_path, texts):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([t.decode() for t in texts.values()], trainer)
    file = str(tmp_path / "tokenizer.json")
    model.enable_truncation(7)  # of rows for some model: documents stay whole
    model.enable_padding(length=999)
    model.save(file)
    model.no_truncation()
    model.no_padding()
    corpus = corpus_of(tmp_path / "texts", "part0/*.txt", file, tmp_path / "cache")
    assert (corpus.tokens.dtype, corpus.vocab_size) == (np.uint16, model.get_vocab_size())
    assert len(corpus.tokens) < sum(len(t) for n, t in texts.items() if n.startswith("part0/")) / 2
    decoded = {model.decode(d.tolist()) for d in documents(corpus)}
    assert decoded == {t.decode() for n, t in texts.items() if n.startswith("part0/")}


def test_tokens_are_made_once_and_again_when_a_file_changes(tmp_path, corpus, texts):
    facts = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    again = corpus_of(tmp_path / "texts", cache=tmp_path / "cache")
    assert again.digest == corpus.digest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")} == facts
    name = next(iter(texts))
    (tmp_path / "texts" / name).write_bytes(texts[name] + b"!")
    changed = corpus_of(tmp_path / "texts", cache=tmp_path / "cache")
    assert changed.digest != corpus.digest
    assert len(changed.tokens) == len(corpus.tokens) + 1


def test_what_a_run_writes_is_no_document(tmp_path, texts):
    """A folder may hold its run: the second start reads what the first one read."""
    out = tmp_path / "texts" / "run"
    before = corpus_of(tmp_path / "texts", cache=tmp_path / "cache")
    for name in ("checkpoints/step-00000001.pt", "model/config.json", "metrics.jsonl", "curve.png"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    for _ in range(2):  # the second finds the tokens of the first below `out`
        again = corpus_of(tmp_path / "texts", cache=out / "tokens", out=out)
        assert again.digest == before.digest
    (out / "notes.txt").write_text("x")
    assert corpus_of(tmp_path / "texts", cache=out / "tokens", out=out).digest != before.digest


def test_rows_hold_every_token_once_with_the_next_one_as_label(corpus):
    total = len(corpus.tokens)
    rows = Rows(corpus, 5, total, LENGTH)
    batch = rows.batch(np.arange(rows.count), "cpu")
    assert total - 5 - LENGTH <= rows.count * LENGTH < total - 5
    assert np.array_equal(batch.input_ids.flatten(), corpus.tokens[5 : 5 + rows.count * LENGTH])
    place = np.arange(5, 5 + rows.count * LENGTH)
    edges = {int(end) - 1 for end in corpus.ends}
    want = [IGNORED if t in edges else int(corpus.tokens[t + 1]) for t in place]
    assert batch.labels.flatten().tolist() == want
    of = np.concatenate([np.full(len(d), k) for k, d in enumerate(documents(corpus))])[place]
    same = np.diff(of.reshape(-1, LENGTH)) == 0
    assert np.array_equal(np.diff(batch.seq_idx) == 0, same)
    assert 0 < same.mean() < 1


def test_no_document_is_seen_from_another(corpus):
    """The loss of a packed row is that of its documents, each alone: values and gradients."""
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=8, n_layer=2, vocab_size=256)).double()
    objective, rows = Objective(model, options={"backend": "torch"}), Rows(corpus, 0, 1000, LENGTH)
    batches = [rows.batch(np.array([k]), "cpu") for k in range(20)]
    packed = next(batch for batch in batches if batch.seq_idx is not None)
    cuts = (packed.seq_idx[0].diff().nonzero()[:, 0] + 1).tolist()
    pieces = zip([0, *cuts], [*cuts, LENGTH], strict=True)
    alone = [packed._replace(input_ids=packed.input_ids[:, a:b], labels=packed.labels[:, a:b], seq_idx=None)
             for a, b in pieces]  # fmt: skip
    alone = [b for b in alone if (b.labels != IGNORED).any()]
    counts = [(b.labels != IGNORED).sum() for b in alone]
    want = sum(objective(b) * n for b, n in zip(alone, counts, strict=True)) / sum(counts)
    leaking = objective(packed._replace(seq_idx=None))
    got = objective(packed)
    limit = 10 * bound(got, got)
    check("loss", got, want, limit)
    assert abs(leaking - want) > 100 * limit * abs(want)
    for a, b in zip(*(torch.autograd.grad(v, list(model.parameters())) for v in (got, want)), strict=True):
        check("gradient", a, b, limit)


def test_an_epoch_takes_each_row_once_and_the_next_in_another_order(corpus):
    data = text_data(corpus)
    count = data.train.count
    data.seek(0)
    taken = torch.cat([data.next().input_ids for _ in range(2 * count)])[: 2 * count]
    every = data.train.batch(np.arange(count), "cpu").input_ids
    for epoch in taken[:count], taken[count:]:
        assert torch.equal(torch.unique(epoch, dim=0), torch.unique(every, dim=0))
    assert not torch.equal(taken[:count], taken[count:])
    assert not torch.equal(taken[:count], every)


def test_what_stands_at_a_position_does_not_depend_on_the_way_there(corpus):
    data, other = text_data(corpus), text_data(corpus, batch_size=1)
    for position in (0, 4, data.train.count - 1, 5 * data.train.count + 2, 4):
        data.seek(position)
        rows = data.next().input_ids
        for k in range(3):
            other.seek(position + k)
            assert torch.equal(other.next().input_ids[0], rows[k])
    data.seek(0)
    another = text_data(corpus, seed=1)
    assert not torch.equal(data.next().input_ids, another.next().input_ids)


def test_validation_is_never_trained_on(corpus):
    data = text_data(corpus)
    held_out = torch.cat([b.input_ids for b in data.validation(1000)])
    assert len(held_out) == data.held_out.count >= 3
    last_trained = data.train.count * LENGTH  # the label of the last row
    assert last_trained < data.held_out.first
    assert np.array_equal(held_out[0], corpus.tokens[data.held_out.first :][:LENGTH])
    assert [len(b.input_ids) for b in data.validation(2)] == [3, 3]
    assert list(text_data(corpus, validation=0).validation(2)) == []


@pytest.mark.parametrize(
    "folder, files, message",
    [
        ("nowhere", "**/*", "data.folder: expected a folder of text files, got '.*nowhere'"),
        ("texts", "*.md", r"data.files: no file in .*texts matches '\*.md'"),
        ("texts", "/etc/*", r"data.files: expected a pattern as '\*\*/\*.txt', got '/etc/\*'"),
        ("texts", "", r"data.files: expected a pattern as '\*\*/\*.txt', got ''"),
    ],
)
def test_errors_name_the_folder(tmp_path, texts, folder, files, message):
    with pytest.raises(DataError, match=message):
        corpus_of(tmp_path / folder, files, cache=tmp_path / "cache")


def test_errors_name_the_file_and_the_sizes(tmp_path, corpus):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?")
    tokenizers.Tokenizer(words).save(str(tmp_path / "words.json"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: is not UTF-8"):
        corpus_of(tmp_path / "bad", tokenizer=str(tmp_path / "words.json"), cache=tmp_path / "cache")
    for file, message in (("none.json", "expected a file of the tokenizers library, got .*none.json"),
                          ("bad/latin.txt", "latin.txt is no file of the tokenizers library")):  # fmt: skip
        with pytest.raises(DataError, match=rf"data\.tokenizer: .*{message}"):
            corpus_of(tmp_path / "texts", tokenizer=str(tmp_path / file), cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"data\.folder: expected a folder of text files, got ''"):
        corpus_of("", cache=tmp_path / "cache")
    with pytest.raises(DataError, match="fewer than one row: seqlen = 100000"):
        TextData(corpus, 1, 100000, 0, "cpu")
    with pytest.raises(DataError, match=r"data\.validation: 1 tokens held out, fewer than one row"):
        text_data(corpus, validation=1 / len(corpus.tokens))
    with pytest.raises(DataError, match=r"data\.validation: expected a fraction .* got 1"):
        text_data(corpus, validation=1)
