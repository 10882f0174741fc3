"""Load and save a language model, in the form of the published package and in that of transformers."""

import json
import os
import re
from pathlib import Path

import torch

from mamba_fast.checkpoint_config import config_of, to_hf
from mamba_fast.checkpoint_files import (
    BIN,
    CONFIG,
    SAFETENSORS,
    WEIGHTS,
    CheckpointError,
    read_json,
    read_weights,
    source_of,
)

__all__ = ["CheckpointError", "load_config_hf", "load_pretrained", "load_state_dict_hf", "save_pretrained"]

EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
HF_EMBEDDING = "backbone.embeddings.weight"  # the one name that transformers has changed
SHOWN = 6  # problems in one message


def load_pretrained(
    cls, name_or_dir, device=None, dtype=None, revision=None, *, cache_dir=None, local_files_only=False,
    **kwargs,
):  # fmt: skip
    """A model of class `cls` with the weights of a folder or of the hub, e.g. "state-spaces/mamba-130m".

    Parameters
    ----------
    name_or_dir : a folder, or a name on the hub, which needs huggingface_hub: downloads are cached
    device, dtype : where the model lives, and the type of its parameters: float32 if None, whatever the
        checkpoint has. A_log and D are float32 always.
    revision : branch, tag or commit on the hub
    cache_dir, local_files_only : as huggingface_hub takes them
    kwargs : for `cls`

    Reads config.json in the published form or in that of transformers, and model.safetensors,
    pytorch_model.bin or either in shards with an index. Weights are read as numbers alone: a pickle that
    names code is refused. Every key and shape is checked before anything is filled.

    Raises
    ------
    CheckpointError : names the file, the key, and the shapes expected and found
    ImportError : huggingface_hub or safetensors is needed
    """
    source = source_of(name_or_dir, revision, cache_dir, local_files_only)
    config_file = f"{source.name}/{CONFIG}"
    config = config_of(read_json(source, CONFIG), config_file)
    entries = read_weights(source)
    if EMBEDDING not in entries and HF_EMBEDDING in entries:
        entries[EMBEDDING] = entries.pop(HF_EMBEDDING)
    layers = {m[1] for key in entries if (m := re.match(r"backbone\.layers\.(\d+)\.", key))}
    if len(layers) != config.n_layer:
        raise CheckpointError(
            f"{config_file}: n_layer: {config.n_layer} layers, but the weights hold {len(layers)}"
        )
    model = cls(config, device="meta", dtype=dtype, **kwargs)
    _check(model, entries, source.name)
    _fill(model, entries, device)
    return model


def _check(model, entries, name):
    """CheckpointError with every key that is missing, unknown or of another shape."""
    wanted = {key: tuple(v.shape) for key, v in model.state_dict().items()}
    tied = model.config.tie_embeddings
    missing = [k for k in wanted if k not in entries and not (tied and k == HEAD)]
    lines = [f"{name}: {k}: expected shape {wanted[k]}, found no such key" for k in missing]
    for key, entry in entries.items():
        if key not in wanted:
            lines.append(f"{entry.file}: {key}: no such parameter (shape {entry.shape})")
        elif entry.shape != wanted[key]:
            lines.append(f"{entry.file}: {key}: expected shape {wanted[key]}, got {entry.shape}")
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise CheckpointError("\n".join([*lines[:SHOWN], *more]))
    if tied and HEAD in entries and not torch.equal(entries[HEAD].read(), entries[EMBEDDING].read()):
        raise CheckpointError(
            f"{entries[HEAD].file}: {HEAD}: differs from {EMBEDDING}, but the config ties them"
        )


def _fill(model, entries, device):
    """The parameters of a model on the meta device, one after the other."""
    state = {}
    for key, parameter in model.state_dict().items():
        if model.config.tie_embeddings and key == HEAD:
            state[key] = state[EMBEDDING]
            continue
        place = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        state[key] = place.copy_(entries[key].read())
    model.load_state_dict(state, assign=True)
    model.tie_weights()


@torch.no_grad()
def save_pretrained(model, save_directory, format="published"):
    """Write the weights and config.json into a folder, which is made if it is not there.

    format : "published", pytorch_model.bin and the config of the published package; or "hf",
    model.safetensors and the config of transformers, which has no padding: its vocab_size is the padded one.

    Raises ValueError for an unknown format or a model that transformers has no words for, FileExistsError
    where other weights lie, which a loader might take for these. Each file appears complete or not at all.
    """
    if format not in ("published", "hf"):
        raise ValueError(f"format: expected 'published' or 'hf', got {format!r}")
    config = to_hf(model.config) if format == "hf" else dict(vars(model.config))
    file = SAFETENSORS if format == "hf" else BIN
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    for other in WEIGHTS:
        if other != file and (folder / other).exists():
            raise FileExistsError(
                f"{folder}: holds other weights, {other}: remove them or take an empty folder"
            )
    state = {key: v.detach().cpu().contiguous() for key, v in model.state_dict().items()}
    if model.config.tie_embeddings:
        state[HEAD] = state[EMBEDDING]  # one copy in the file
    if format == "published":
        _write(folder / file, lambda path: torch.save(state, path))
    else:
        _write(folder / file, lambda path: _save_safetensors(state, path, model.config.tie_embeddings))
        config["dtype"] = str(state[EMBEDDING].dtype).removeprefix("torch.")
    text = json.dumps(config, indent=4)
    _write(folder / CONFIG, lambda path: path.write_text(text + "\n", "utf-8"))


def _save_safetensors(state, path, tied):
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError("format 'hf' needs safetensors: pip install 'mamba-fast[hf]'") from None
    names = {EMBEDDING: HF_EMBEDDING}
    held = {names.get(k, k): v for k, v in state.items() if not (tied and k == HEAD)}
    save_file(held, path, metadata={"format": "pt"})


def _write(path, write):
    """Write beside `path`, then move it there in one step."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # what the user's umask allows: some libraries write for the owner alone
        write(beside)
        beside.chmod(mode)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_config_hf(model_name):
    """config.json of a folder or of the hub, as it is: the published helper."""
    return read_json(source_of(model_name), CONFIG)


def load_state_dict_hf(model_name, device=None, dtype=None):
    """Every tensor of a folder or of the hub by its key: the published helper."""
    entries = read_weights(source_of(model_name))
    return {key: entry.read().to(device=device, dtype=dtype, copy=True) for key, entry in entries.items()}
