"""A folder of small texts, a tiny configuration, and what two runs must share to be the same run."""

import random

import torch

from mamba_fast.train import load_config
from mamba_fast.train.metrics import TIMES

TINY = {
    "batch_size": 2, "seqlen": 24, "steps": 6, "lr": 0.01, "log_every": 1, "backend": "torch",
    "device": "cpu", "model": {"d_model": 8, "n_layer": 2},
}  # fmt: skip


def write_texts(folder, seed=0, documents=12, longest=300):
    """{name: bytes} of small documents, some in a folder of their own; their sizes differ."""
    rng, texts = random.Random(seed), {}
    for k in range(documents):
        name = f"part{k % 2}/text{k}.txt"
        words = rng.choices(["state", "space", "scan", "Δ", "gate", "\n"], k=rng.randint(1, longest // 6))
        texts[name] = " ".join(words).encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(texts[name])
    return texts


def tiny(folder, **changes):
    """The :class:`TrainConfig` of TINY with changes, in `folder`/run; text is read from `folder`/texts."""
    settings = TINY | {"out": str(folder / "run")}
    if changes.get("task", "text") == "text":
        settings["data"] = {"folder": str(folder / "texts"), "validation": 0.1}
    return load_config(None, settings | changes)


def flat(state, path=""):
    """{path: value} of nested dicts and lists."""
    if isinstance(state, dict):
        return {k: v for key in state for k, v in flat(state[key], f"{path}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, item in enumerate(state) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: state}


def check_same_run(state, lines, other_state, other_lines):
    """Every tensor and every value of two checkpoints has the same bits, and so have the metrics."""
    a, b = ({k: v for k, v in flat(s).items() if k not in ("/seconds", "/config/out")}
            for s in (state, other_state))  # fmt: skip
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, name
    assert [untimed(line) for line in lines] == [untimed(line) for line in other_lines]


def untimed(line):
    return {k: v for k, v in line.items() if k not in TIMES}
