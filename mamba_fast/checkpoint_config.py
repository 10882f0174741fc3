"""The two forms of config.json: that of the published package, and that of transformers."""

import dataclasses
import math

from mamba_fast.checkpoint_files import CheckpointError
from mamba_fast.config import MambaConfig

EPSILON = 1e-5  # of every norm: the published model has no other
LARGEST = 2**24  # of a size: with larger ones PyTorch cannot count the bytes of a matrix

# transformers' name: (keyword of Mamba, value where the file says nothing)
_MIXER = {
    "state_size": ("d_state", 16),
    "conv_kernel": ("d_conv", 4),
    "expand": ("expand", 2),
    "time_step_rank": ("dt_rank", "auto"),
    "time_step_min": ("dt_min", 0.001),
    "time_step_max": ("dt_max", 0.1),
    "time_step_init_scheme": ("dt_init", "random"),
    "time_step_scale": ("dt_scale", 1.0),
    "time_step_floor": ("dt_init_floor", 1e-4),
    "use_conv_bias": ("conv_bias", True),
    "use_bias": ("bias", False),
}


def _is_size(v):
    return type(v) is int and 1 <= v <= LARGEST


def _is_number(v, least=0.0):
    return type(v) in (int, float) and least <= v <= LARGEST


_SIZE = "a whole number from 1 to 2**24"
_OPTIONS = {  # keyword of Mamba: what its values are, and in words
    "d_state": (_is_size, _SIZE),
    "d_conv": (lambda v: type(v) is int and 2 <= v <= 4, "2, 3 or 4"),
    "dt_rank": (lambda v: v == "auto" or _is_size(v), f"'auto' or {_SIZE}"),
    "dt_init": (lambda v: v in ("random", "constant"), "'random' or 'constant'"),
    **dict.fromkeys(("expand", "dt_min", "dt_max"), (lambda v: _is_number(v, 1e-30), "a positive number")),
    **dict.fromkeys(("dt_scale", "dt_init_floor"), (_is_number, "a number, not negative")),
    **dict.fromkeys(("conv_bias", "bias", "use_fast_path"), (lambda v: v in (True, False), "true or false")),
}


def _check_option(where, option, value):
    accepts, words = _OPTIONS[option]
    if not accepts(value):
        raise CheckpointError(f"{where}: expected {words}, got {value!r}")


def config_of(found, file):
    """The :class:`MambaConfig` in a config.json of either form; CheckpointError names what is wrong."""
    is_hf = "model_type" in found or "hidden_size" in found
    values = _from_hf(found, file) if is_hf else dict(found)
    known = {f.name: f for f in dataclasses.fields(MambaConfig)}
    for key, value in values.items():
        if key not in known:
            raise CheckpointError(f"{file}: {key}: not a field of MambaConfig")
        kind = known[key].type
        if type(value) is not kind:
            raise CheckpointError(f"{file}: {key}: expected {kind.__name__}, got {value!r}")
        if kind is int and not (_is_size(value) or (key == "d_intermediate" and value == 0)):
            raise CheckpointError(f"{file}: {key}: expected {_SIZE}, got {value!r}")
    config = MambaConfig(**values)
    if config.attn_layer_idx:
        raise CheckpointError(
            f"{file}: attn_layer_idx: attention is not supported, got {config.attn_layer_idx}"
        )
    _check_mixer(config, file)
    return config


def _check_mixer(config, file):
    kind = config.ssm_cfg.get("layer", "Mamba1")
    if kind != "Mamba1":
        raise CheckpointError(f"{file}: ssm_cfg: expected layer 'Mamba1', got {kind!r}")
    for key, value in config.ssm_cfg.items():
        if key not in (*_OPTIONS, "layer"):
            raise CheckpointError(f"{file}: ssm_cfg: {key}: not a keyword of Mamba")
        if key != "layer":
            _check_option(f"{file}: ssm_cfg: {key}", key, value)
    inner = int(config.ssm_cfg.get("expand", 2) * config.d_model)
    if not _is_size(inner):
        raise CheckpointError(f"{file}: expand: expected expand * d_model {_SIZE}, got {inner}")


def _from_hf(found, file):
    """The published fields that say what a config of transformers says."""

    def must(key, accepted, default):
        if found.get(key, default) not in accepted:
            raise CheckpointError(f"{file}: {key}: expected {accepted[0]!r}, got {found[key]!r}")

    must("model_type", ("mamba",), "mamba")
    must("hidden_act", ("silu", "swish"), "silu")
    must("layer_norm_epsilon", (EPSILON,), EPSILON)
    sizes = {
        k: found.get(k, d)
        for k, d in (("hidden_size", 768), ("num_hidden_layers", 32), ("vocab_size", 50280))
    }
    for key, value in sizes.items():
        if not _is_size(value):
            raise CheckpointError(f"{file}: {key}: expected {_SIZE}, got {value!r}")
    width, vocab_size = sizes["hidden_size"], sizes["vocab_size"]
    mixer = {}
    for key, (ours, default) in _MIXER.items():
        _check_option(f"{file}: {key}", ours, found.get(key, default))
        if found.get(key, default) != default:
            mixer[ours] = found[key]
    if mixer.get("dt_rank") == math.ceil(width / 16):
        del mixer["dt_rank"]
    expand = mixer.get("expand", 2)
    inner = found.get("intermediate_size")
    if inner is not None and inner != int(expand * width):
        raise CheckpointError(
            f"{file}: intermediate_size: expected expand * hidden_size = {expand} * {width}, got {inner!r}"
        )
    return {
        "d_model": width,
        "n_layer": sizes["num_hidden_layers"],
        "vocab_size": vocab_size,
        "pad_vocab_size_multiple": 1 if vocab_size % 8 else 8,  # transformers pads nothing
        "ssm_cfg": mixer,
        "residual_in_fp32": found.get("residual_in_fp32", True),
        "tie_embeddings": found.get("tie_word_embeddings", True),
    }


def to_hf(config):
    """A config for transformers; ValueError names a field that it has no word for."""
    for key, wanted in (("rms_norm", True), ("d_intermediate", 0)):
        if getattr(config, key) != wanted:
            raise ValueError(f"format: 'hf' knows {key} = {wanted!r} alone, got {getattr(config, key)!r}")
    options = {k: v for k, v in config.ssm_cfg.items() if k not in ("layer", "use_fast_path")}
    mixer = {key: options.get(ours, default) for key, (ours, default) in _MIXER.items()}
    mixer |= {key: float(mixer[key]) for key, (_, default) in _MIXER.items() if type(default) is float}
    if mixer["expand"] != int(mixer["expand"]):
        raise ValueError(f"format: 'hf' knows whole numbers for expand alone, got {mixer['expand']!r}")
    mixer["expand"] = int(mixer["expand"])
    if mixer["time_step_rank"] == "auto":
        mixer["time_step_rank"] = math.ceil(config.d_model / 16)
    return mixer | {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "intermediate_size": int(mixer["expand"] * config.d_model),
        "vocab_size": config.padded_vocab_size(),
        "layer_norm_epsilon": EPSILON,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rescale_prenorm_residual": False,  # True makes transformers draw out_proj anew after it is loaded
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
    }
