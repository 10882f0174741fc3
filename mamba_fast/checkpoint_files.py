"""The files of a checkpoint: where they are, what they hold, and nothing run that they bring along."""

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", BIN, f"{BIN}.index.json")  # in order of preference
CONFIG = "config.json"
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file, the key and the shapes."""


class Entry(NamedTuple):
    """One tensor of a checkpoint, not read yet: `read()` returns it on the CPU."""

    file: str
    shape: tuple
    dtype: str
    read: object


class Folder:
    """A checkpoint in a folder."""

    missing, where = None, ""

    def __init__(self, path):
        self.name, self.path = str(path), Path(path)

    def get(self, file):
        path = self.path / file
        return path if path.is_file() else None


class Hub:
    """A checkpoint on the Hugging Face hub, every file from one commit.

    missing: huggingface_hub's error for a file that was not there; where: where that was.
    """

    missing, where = None, ""

    def __init__(self, name, revision, cache_dir, local_files_only):
        self.name, self.revision = name, revision
        self.options = {"cache_dir": cache_dir, "local_files_only": local_files_only}

    def get(self, file):
        try:
            from huggingface_hub import errors, hf_hub_download
        except ImportError:
            raise ImportError(
                f"{self.name!r} is not a folder, and the hub needs huggingface_hub: "
                "pip install 'mamba-fast[hf]'"
            ) from None
        try:
            path = Path(hf_hub_download(self.name, file, revision=self.revision, **self.options))
        except errors.EntryNotFoundError as error:
            self.missing = error
            if isinstance(error, errors.LocalEntryNotFoundError):
                self.where = " in the cache, and the hub was not asked or did not answer"
            return None
        except errors.HFValidationError as error:
            raise CheckpointError(f"{self.name}: no such folder, and no name on the hub: {error}") from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            at = f" at revision {self.revision!r}" if self.revision else ""
            raise CheckpointError(f"{self.name}{at}: no such folder, and not found on the hub") from error
        if path.parent.parent.name == "snapshots":
            self.revision = path.parent.name  # the commit: a branch may move before the next file
        return path


def source_of(name_or_dir, revision=None, cache_dir=None, local_files_only=False):
    """The :class:`Folder` of that path, if there is one, else the :class:`Hub` checkpoint of that name."""
    if Path(name_or_dir).is_dir():
        return Folder(name_or_dir)
    return Hub(str(name_or_dir), revision, cache_dir, local_files_only)


def read_json(source, file):
    """The object in a JSON file of the checkpoint; CheckpointError if it is not there or not an object."""
    path = source.get(file)
    if path is None:
        raise _not_there(source, file)
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def read_weights(source):
    """Every tensor of the checkpoint, {key: Entry}, from one file or from shards with an index."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        usable = WEIGHTS[2:]
    else:
        usable = WEIGHTS
    for file in usable:
        path = source.get(file)
        if path is not None:
            return _read_shards(source, file) if file.endswith(".json") else _read(path)
    if usable != WEIGHTS and any(source.get(file) is not None for file in WEIGHTS[:2]):
        raise ImportError(f"{source.name}: its weights need safetensors: pip install 'mamba-fast[hf]'")
    raise _not_there(source, " or ".join(WEIGHTS))


def _not_there(source, file):
    error = CheckpointError(f"{source.name}: expected a file {file}, found none{source.where}")
    error.__cause__ = source.missing
    return error


def _read_shards(source, index):
    """The tensors that the index lists, each in the shard where it says they are."""
    shard_of = read_json(source, index).get("weight_map")
    pairs = shard_of.items() if isinstance(shard_of, dict) else [(None, None)]
    kind = Path(index.removesuffix(".index.json")).suffix
    for key, file in pairs:
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file) or Path(file).suffix != kind:
            raise CheckpointError(
                f"{source.name}/{index}: {key}: expected a *{kind} file of this folder, got {file!r}"
            )
    found = {}
    for file in sorted(set(shard_of.values())):
        path = source.get(file)
        if path is None:
            raise _not_there(source, file)
        held, listed = _read(path), {key for key, shard in pairs if shard == file}
        for key in sorted(listed ^ set(held)):
            where = "it is not there" if key in listed else "the index does not list it"
            raise CheckpointError(f"{path}: {key}: {where} ({index})")
        found |= held
    return found


def _read(path):
    """{key: Entry} of one file of weights."""
    held = _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
    for key, entry in held.items():
        if entry.dtype not in ("float32", "float16", "bfloat16", "float64"):
            raise CheckpointError(f"{path}: {key}: expected a float tensor, got {entry.dtype}")
    return held


def _read_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu")
        with file:
            held = {key: file.get_slice(key) for key in file.keys()}
            return {
                key: Entry(
                    str(path), tuple(v.get_shape()), _SHORT.get(v.get_dtype(), v.get_dtype()), _of(path, key)
                )
                for key, v in held.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file: {error}") from error


_SHORT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def _of(path, key):
    def read():
        from safetensors import safe_open

        with safe_open(path, framework="pt", device="cpu") as file:
            return file.get_tensor(key)

    return read


def _read_bin(path):
    """A file of torch.save: plain tensors are taken, anything that names code is refused unread."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the form of what is refused below
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            text = f"refused: it names {named[1]}, which is code and not a tensor; nothing of it was run"
        else:
            text = "refused: truncated, or not plain tensors"
        raise CheckpointError(f"{path}: {text}") from None
    except Exception as error:  # torch raises many kinds on a broken file
        text = (str(error).splitlines() or [""])[0].split(". ")[0]
        raise CheckpointError(
            f"{path}: truncated, or not a file of torch.save: {type(error).__name__} {text}"
        ) from None
    if not isinstance(held, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, got {type(held).__name__}")
    for key, v in held.items():
        if not isinstance(key, str) or not isinstance(v, torch.Tensor):
            raise CheckpointError(f"{path}: {key}: expected a tensor under a name, got {type(v).__name__}")
        if v.layout is not torch.strided or v.device.type != "cpu":
            raise CheckpointError(f"{path}: {key}: expected a dense tensor, got {v.layout} on {v.device}")
    return {
        key: Entry(str(path), tuple(v.shape), str(v.dtype).removeprefix("torch."), v.detach)
        for key, v in held.items()
    }
