"""Text that every reader has, the source of Python's own standard library, and what predicts it how well.

All results are in bits per byte of text: -log2 of the probability that a predictor gave to what came.
"""

import lzma
import math
import sysconfig
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "importlib", "json",
    "logging", "multiprocessing", "unittest", "urllib", "xml", "zoneinfo",
)  # fmt: skip
ADDED = ("_sysconfigdata", "sitecustomize", "usercustomize")  # by who built or installed this Python
HELD_OUT = 10  # one file in so many is kept for testing


def standard_library(folder=None):
    """Two texts, for training and for testing: {file name: its bytes}, in order of the names.

    folder: where the standard library lies; that of the running Python if None. Holds its modules and
    PACKAGES, without their tests. A file goes to the testing text by its name alone, so that another
    version of Python tests on the same files. Raises FileNotFoundError where there is no source.
    """
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    paths = [p for p in folder.glob("*.py") if not p.name.startswith(ADDED)]
    paths += [p for name in PACKAGES for p in (folder / name).rglob("*.py")]
    texts = {p.relative_to(folder).as_posix(): p for p in paths}
    texts = {name: texts[name].read_bytes() for name in sorted(texts) if "test" not in name.split("/")[:-1]}
    train = {name: text for name, text in texts.items() if zlib.crc32(name.encode()) % HELD_OUT}
    test = {name: text for name, text in texts.items() if name not in train}
    if not train or not test:
        raise FileNotFoundError(f"folder: {folder} holds no source of the standard library")
    return train, test


def bytes_of(texts):
    """The files one after the other, uint8 (L,)."""
    return torch.frombuffer(bytearray(b"".join(texts.values())), dtype=torch.uint8)


def fit(logits_of, groups, text, steps, *, batch=8, seqlen=256, lr=4e-3, seed=0, progress=True):
    """Train a model to predict the next byte: AdamW on random windows of the text.

    logits_of: (B, L) ids to (B, L, V) logits. groups: what AdamW takes. text: uint8 (L,). The learning
    rate rises for a twentieth of the steps and then falls to zero as a cosine; gradients are cut at norm 1.
    Returns the loss of every step, in bits per byte, a float32 array.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device, losses = parameters[0].device, np.empty(steps, np.float32)
    windows = text.unfold(0, seqlen + 1, 1)
    for step in tqdm(range(steps), disable=not progress, unit="step"):
        rate = min(1, (step + 1) / (steps / 20)) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        rows = windows[torch.randint(len(windows), (batch,), generator=generator)].long().to(device)
        loss = F.cross_entropy(logits_of(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses[step] = loss.item() / math.log(2)
    return losses


def bits(logits, ids):
    """-log2 of the probability of each next byte: logits (..., L, V), ids (..., L), to (..., L)."""
    return F.cross_entropy(logits.float().movedim(-1, 1), ids, reduction="none") / math.log(2)


def compressed(text):
    """Bits per byte of what compressors make of a text that nothing came before: {name: bits}."""
    data = text.numpy().tobytes()
    packed = {"zlib": zlib.compress(data, 9), "lzma": lzma.compress(data, preset=9)}
    return {name: 8 * len(short) / len(data) for name, short in packed.items()}


def ngram_bits(train, test, order):
    """Bits of every byte of `test`, (L,), for a table of counts over the last 0 .. `order` bytes each.

    Row k of the result, (order + 1, L), looks k bytes back. Interpolated as Witten and Bell do:
    p_k(c | w) = (N(w c) + T(w) p_{k-1}(c | w')) / (N(w) + T(w)), N how often, T how many different bytes
    followed w, w' = w without its oldest byte. Costs O(order L log L) operations.
    """
    train, test = (x.numpy().astype(np.int64) for x in (train, test))
    p, rows = np.full(len(test), 1 / 256), []
    for k in range(order + 1):
        contexts, seen = _contexts(train, k), _contexts(test, k)
        pairs, pair_counts = np.unique(contexts * 256 + train, return_counts=True)
        words, first, different = np.unique(pairs // 256, return_index=True, return_counts=True)
        total = np.add.reduceat(pair_counts, first)
        came, kinds = _look_up(words, total, seen), _look_up(words, different, seen)
        both = _look_up(pairs, pair_counts, seen * 256 + test)
        p = np.where(came > 0, (both + kinds * p) / np.maximum(came + kinds, 1), p)
        rows.append(-np.log2(p))
    return np.array(rows)


def _contexts(text, k):
    """The k bytes before each byte as one number; zeros stand before the text."""
    padded = np.concatenate([np.zeros(k, np.int64), text])
    code = np.zeros(len(text), np.int64)
    for back in range(k, 0, -1):
        code = code * 256 + padded[k - back : k - back + len(text)]
    return code


def _look_up(keys, values, wanted):
    """The value of each wanted key, 0 where it is not there; keys are sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
