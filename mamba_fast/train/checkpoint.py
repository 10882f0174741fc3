"""Checkpoints of a run: written in one piece, the last two kept, and a damaged one refused by name."""

import os
import pickle
import random
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import torch

from mamba_fast.checkpoint_files import CheckpointError

KEPT = 2
_NAME = re.compile(r"step-(\d+)\.pt")
_UNREADABLE = (  # what zipfile, pickle and torch say of wrong bytes; a UnicodeDecodeError is a ValueError
    zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError, OSError, RuntimeError,
    ValueError, KeyError,
)  # fmt: skip


def save(folder, step, state):
    """Write `state`, tensors and plain values, as the checkpoint of `step`; older ones than two go.

    The file gets its name when all of it is on the disk: a process or a machine that stops in between
    leaves the previous checkpoint as it was. Those of later steps, if there are any, are removed: the run
    was taken up before them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(unfinished, path)
    _sync(folder)
    before = [old for number, old in _found(folder) if number <= step][:KEPT]
    for old in [*folder.glob("step-*.pt"), *folder.glob("step-*.tmp")]:
        if old not in before:
            old.unlink()
    return path


def load_latest(folder):
    """(path, state on the CPU) of the newest whole checkpoint in `folder`; None if there is none at all.

    A damaged one is named in a warning, and the one before it is taken. Raises CheckpointError, naming
    each, if every one is damaged.
    """
    refused = []
    for _, path in _found(Path(folder)):
        try:
            state = load(path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for message in refused:
            warnings.warn(f"{message}; {path.name} is used", stacklevel=2)
        return path, state
    if refused:
        raise CheckpointError("\n".join(refused))
    return None


def load(path):
    """The state in that file, its tensors on the CPU; CheckpointError if a byte of it is not as written."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
            damaged = file.testzip()
            # nor do they cover the directory: an entry that calls itself a folder is read as nothing at all
            damaged = damaged or next((e.filename for e in file.infolist() if e.external_attr), None)
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise CheckpointError(f"{path}: truncated or no checkpoint: {error}") from error
    if damaged:
        raise CheckpointError(f"{path}: damaged: the checksum of {damaged} does not match")
    return state


def random_states():
    """The state of every global generator: Python's, torch's on the CPU, and on each GPU."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states):
    """Go on where :func:`random_states` was."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _found(folder):
    """(step, path) of each checkpoint, the newest first."""
    named = [(m, path) for path in folder.glob("step-*.pt") if (m := _NAME.fullmatch(path.name))]
    return sorted(((int(m[1]), path) for m, path in named), reverse=True)


def _sync(folder):
    """Make a new name in a folder survive a loss of power, where the system can."""
    if os.name == "posix":
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
