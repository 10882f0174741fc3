"""A folder of text files as rows of tokens: memory-mapped, packed, in an order that a seed decides."""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mamba_fast.train.tasks import IGNORED, Batch


class DataError(ValueError):
    """Files that cannot be trained on: the message names the folder or the file."""


class Corpus(NamedTuple):
    """Tokens of all documents one after the other, and where each one ends.

    tokens: (T,) unsigned, mapped from a file. ends: (documents,) int64. digest: sha256 of both.
    """

    tokens: np.ndarray
    ends: np.ndarray
    vocab_size: int
    digest: str


WRITTEN = ("checkpoints", "model", "metrics.jsonl", "curve.png")  # in `out`, by a run


def corpus_of(folder, files="**/*", tokenizer="", cache="out/tokens", out=None):
    """The :class:`Corpus` of the files in `folder` that match the pattern `files`, one document each.

    Tokens are bytes; or those of `tokenizer`, the path of a file of the tokenizers library. They are written
    to `cache` once, and mapped from there: memory holds one document at a time while they are made, and
    what is read of them later. Documents stand in the order of a hash of their names, which is as good as
    any and the same everywhere. What a run writes to the folder `out` is no document. Raises DataError,
    naming folder or file.
    """
    root = Path(folder)
    if not (str(folder) and root.is_dir()):
        raise DataError(f"data.folder: expected a folder of text files, got {str(folder)!r}")
    written = {Path(cache).resolve(), *(Path(out).resolve() / name for name in WRITTEN if out)}
    try:
        found = [p for p in root.glob(files) if p.is_file() and p.stat().st_size]
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"data.files: expected a pattern as '**/*.txt', got {files!r}: {error}") from None
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    found = [p for p in found if written.isdisjoint([p.resolve(), *p.resolve().parents])]
    if not found:
        raise DataError(f"data.files: no file in {root} matches {files!r} and has a byte in it")
    names = {p.relative_to(root).as_posix(): p for p in found}
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    facts = [[n, s.st_size, s.st_mtime_ns] for n in order for s in [names[n].stat()]]
    if tokenizer and not Path(tokenizer).is_file():
        raise DataError(f"data.tokenizer: expected a file of the tokenizers library, got {tokenizer!r}")
    model = Path(tokenizer).read_bytes() if tokenizer else b""
    key = json.dumps([str(root.resolve()), facts, hashlib.sha256(model).hexdigest()])
    place = Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not (place / "facts.json").exists():
        _write(place, [names[name] for name in order], *_encoder(tokenizer))
    told = json.loads((place / "facts.json").read_text("utf-8"))
    tokens = np.memmap(place / "tokens.bin", told["dtype"], "r")
    return Corpus(tokens, np.load(place / "ends.npy"), told["vocab_size"], told["digest"])


def _encoder(tokenizer):
    """A function from a path to an array of tokens, their type, and the size of the vocabulary."""
    if not tokenizer:
        return (lambda path: np.fromfile(path, np.uint8)), np.uint8, 256
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError("data.tokenizer needs tokenizers: pip install 'mamba-fast[train]'") from None
    try:
        model = Tokenizer.from_file(tokenizer)
    except Exception as error:  # the library has no class of its own for it
        raise DataError(
            f"data.tokenizer: {tokenizer} is no file of the tokenizers library: {error}"
        ) from None
    model.no_truncation()  # the file may say at how many tokens a model wants its rows cut or filled up:
    model.no_padding()  # ours are whole documents
    dtype = np.uint16 if model.get_vocab_size() <= 2**16 else np.uint32

    def encode(path):
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8, which a tokenizer reads: {error}") from None
        return np.array(model.encode(text).ids, dtype)

    return encode, dtype, model.get_vocab_size()


def _write(place, paths, encode, dtype, vocab_size):
    """Tokens, ends and, when they are whole, facts.json, each moved to its name in one piece."""
    place.mkdir(parents=True, exist_ok=True)
    digest, ends, total = hashlib.sha256(), [], 0
    own = f"{uuid.uuid4().hex}.tmp"  # another process may be writing the same
    with (place / f"tokens.{own}").open("wb") as out:
        for path in paths:
            tokens = encode(path)
            out.write(tokens.tobytes())
            digest.update(tokens.tobytes())
            total += len(tokens)
            ends.append(total)
    ends = np.array(ends, np.int64)
    digest.update(ends.tobytes())
    with (place / f"ends.{own}").open("wb") as out:
        np.save(out, ends)
    facts = {"dtype": np.dtype(dtype).name, "vocab_size": vocab_size, "digest": digest.hexdigest()}
    (place / f"facts.{own}").write_text(json.dumps(facts), "utf-8")
    for name in ("tokens.bin", "ends.npy", "facts.json"):
        os.replace(place / f"{name.split('.')[0]}.{own}", place / name)


class Rows:
    """Rows of `seqlen` tokens of a stretch of a corpus, each with the next token as its label.

    Row i is tokens i L to (i + 1) L of tokens[first:stop]: whatever documents lie there, in pieces where a
    row ends. The last token of a document has no label, and seq_idx tells documents apart.
    """

    def __init__(self, corpus, first, stop, seqlen):
        self.corpus, self.first, self.seqlen = corpus, first, seqlen
        self.count = max(0, (stop - first - 1) // seqlen)

    def batch(self, index, device):
        """The :class:`Batch` of the rows numbered `index` (B,). seq_idx is None if none holds an edge."""
        place = self.first + index[:, None] * self.seqlen + np.arange(self.seqlen + 1)
        tokens = torch.from_numpy(self.corpus.tokens[place].astype(np.int64))
        seq = torch.from_numpy(np.searchsorted(self.corpus.ends, place, side="right"))
        seq_idx = (seq[:, :-1] - seq[:, :1]).to(torch.int32)
        labels = tokens[:, 1:].masked_fill(seq[:, 1:] != seq[:, :-1], IGNORED)
        packed = seq_idx if seq_idx.any() else None
        sent = (tokens[:, :-1].contiguous(), labels, packed)
        return Batch(*(None if v is None else _send(v, device) for v in sent))


def _send(v, device):
    """To the device, without waiting for it."""
    return v.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else v


class TextData:
    """Batches of text for training, each row once an epoch in an order of the seed; and for validation.

    The last part `validation` of the tokens is never trained on.
    """

    def __init__(self, corpus, batch_size, seqlen, seed, device, validation=0.05):
        if not 0 <= validation < 1:
            raise DataError(f"data.validation: expected a fraction from 0 up to 1, got {validation}")
        total = len(corpus.tokens)
        cut = total - round(total * validation)
        self.train, self.held_out = Rows(corpus, 0, cut, seqlen), Rows(corpus, cut, total, seqlen)
        if not self.train.count:
            raise DataError(f"data.folder: {cut} tokens to train on, fewer than one row: seqlen = {seqlen}")
        if validation and not self.held_out.count:
            raise DataError(
                f"data.validation: {total - cut} tokens held out, fewer than one row: seqlen = {seqlen}; "
                "0 for none"
            )
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.vocab_size, self.digest = corpus.vocab_size, corpus.digest
        self.position, self._orders = 0, {}

    def seek(self, position):
        """Go to the row of that number, counted through all epochs."""
        self.position = position

    def next(self):
        """The next `batch_size` rows; an epoch may end in the middle of them."""
        numbers = range(self.position, self.position + self.batch_size)
        self.position += self.batch_size
        count = self.train.count
        return self.train.batch(np.array([self._order(n // count)[n % count] for n in numbers]), self.device)

    def validation(self, batches):
        """The first batches of what was held out, fewer where there are no more."""
        stop = min(self.held_out.count, batches * self.batch_size)
        for first in range(0, stop, self.batch_size):
            yield self.held_out.batch(np.arange(first, min(first + self.batch_size, stop)), self.device)

    def _order(self, epoch):
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.train.count)
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1} | {epoch: order}
        return self._orders[epoch]


def text_data(config, folder="", files="**/*", tokenizer="", validation=0.05, cache=""):
    """The :class:`TextData` of a configuration; its tokens are kept in `cache`, by default below `out`."""
    corpus = corpus_of(folder, files, tokenizer, cache or Path(config.out) / "tokens", config.out)
    return TextData(corpus, config.batch_size, config.seqlen, config.seed, config.device, validation)
