"""What a training run is made of: a TOML file and flags, every key checked before anything starts."""

import difflib
import inspect
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from mamba_fast.config import MambaConfig
from mamba_fast.train.data import text_data
from mamba_fast.train.tasks import copying_data, induction_data

DATA = {"text": text_data, "induction": induction_data, "copying": copying_data}
GENERATED = ("induction", "copying")  # on the device, so that a CUDA graph can hold them
CHOICES = {
    "task": tuple(DATA),
    "dtype": ("float32", "bfloat16", "float16"),
    "schedule": ("constant", "cosine"),
    "backend": ("", "torch", "numba", "triton", "cuda"),
    "parallel": ("ddp", "fsdp", "sequence"),
}
AT_LEAST = {
    "seed": 0, "batch_size": 1, "seqlen": 1, "accumulate": 1, "steps": 0, "warmup": 0, "lr": 0, "final_lr": 0,
    "weight_decay": 0, "clip": 0, "log_every": 1, "eval_every": 0, "eval_batches": 1, "save_every": 1,
}  # fmt: skip
FREE = ("out", "device", "log_every", "save_every", "parallel")  # may differ when a run goes on
TEXTS = ("out", "device", "data.folder", "data.files", "data.tokenizer", "data.cache")  # 2024 is a name there
ROWS = ("batch_size", "accumulate")  # and these, where a step still takes the same rows


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the key, what came and what is accepted."""


@dataclass
class TrainConfig:
    """Every setting of a run.

    out : folder of checkpoints, metrics, curve and model; a run that is in it goes on
    seed, device : device "" is cuda if there is a GPU, else cpu
    dtype : of autocast: float32 (none), bfloat16, or float16 with a loss scaler; parameters stay float32
    backend : that of the scan, "" for the fastest
    deterministic : the same bits in every run, also where a faster kernel would add up in any order
    task : text, induction or copying; `data` has its keywords
    batch_size, seqlen, accumulate : one step is accumulate times batch_size rows of seqlen tokens
    steps, lr, warmup, schedule, final_lr : lr rises over `warmup` steps, then is constant, or a cosine
        down to final_lr
    betas, weight_decay : of AdamW; A_log, D, norms and biases do not decay
    clip : largest norm of the gradient, 0 for none
    gradient_checkpointing : activations of one layer in memory, for one more forward
    graph : a step is one CUDA graph; for the generated tasks
    parallel : how the processes of torchrun share a step: ddp, rows; fsdp, rows, parameters and the states
        of the optimizer; sequence, slices of every row
    log_every, eval_every, eval_batches, save_every : in steps; eval_every 0 for no validation
    model : keywords of :class:`MambaConfig`; vocab_size is the data's if it is not given
    data : keywords of the task
    """

    out: str = "out/train"
    seed: int = 0
    device: str = ""
    dtype: str = "float32"
    backend: str = ""
    deterministic: bool = True
    task: str = "text"
    batch_size: int = 8
    seqlen: int = 256
    accumulate: int = 1
    steps: int = 1000
    lr: float = 1e-3
    warmup: int = 0
    schedule: str = "constant"
    final_lr: float = 0.0
    betas: list = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.1
    clip: float = 1.0
    gradient_checkpointing: bool = False
    graph: bool = False
    parallel: str = "ddp"
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 8
    save_every: int = 1000
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)

    def __post_init__(self):
        for key in fields(self):
            setattr(self, key.name, _typed(key.name, getattr(self, key.name), key.type))
        for key, accepted in CHOICES.items():
            if getattr(self, key) not in accepted:
                raise ConfigError(f"{key}: expected one of {accepted}, got {getattr(self, key)!r}")
        for key, least in AT_LEAST.items():
            if not getattr(self, key) >= least:
                raise ConfigError(f"{key}: expected at least {least}, got {getattr(self, key)}")
        if not (len(self.betas) == 2 and all(type(v) in (int, float) and 0 <= v < 1 for v in self.betas)):
            raise ConfigError(f"betas: expected two numbers from 0 up to 1, got {self.betas}")
        if self.graph and self.task not in GENERATED:
            raise ConfigError(
                f"graph: expected a task of {GENERATED}, got {self.task!r}: its data is on the CPU"
            )
        if self.graph and self.dtype == "float16":
            raise ConfigError("graph: expected dtype float32 or bfloat16, got 'float16' with its scaler")
        if self.graph and self.gradient_checkpointing:
            raise ConfigError("gradient_checkpointing: expected false with graph, got true")
        _known("model", self.model, [f.name for f in fields(MambaConfig)])
        keywords = inspect.signature(DATA[self.task]).parameters
        _known("data", self.data, [name for name in keywords if name != "config"])
        for key, value in self.data.items():
            default = keywords[key].default
            self.data[key] = _typed(f"data.{key}", value, int if default is None else type(default))

    def lr_at(self, step):
        """The learning rate of a step, counted from 0: a rise over `warmup` steps, then the schedule."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        return cosine(self.lr, self.final_lr, (step - self.warmup) / max(1, self.steps - self.warmup))

    def same_run(self, saved, same_rows):
        """ConfigError naming what differs from the settings `saved` with a checkpoint, if it matters.

        same_rows : a step takes as many rows as it did, of all processes together
        """
        mine, free = asdict(self), FREE + ROWS * same_rows
        differ = [k for k in mine if k not in free and mine[k] != saved.get(k)]
        if differ:
            lines = [f"{k}: the run in {self.out} has {saved.get(k)!r}, got {mine[k]!r}" for k in differ]
            raise ConfigError("\n".join([*lines, "choose another `out`, or the same settings"]))


def cosine(high, low, part):
    """From `high` at part = 0 down half a cosine to `low` at part = 1."""
    return low + (high - low) * (1 + math.cos(math.pi * min(1.0, part))) / 2


def load_config(source=None, changes=None):
    """The :class:`TrainConfig` of a TOML file with some settings changed.

    Parameters
    ----------
    source : path of a file, or the name of one that comes with the package (see :func:`packaged`); None
        for the defaults
    changes : {key: value}; "model.d_model" reaches into a table. A string is read as a TOML value where it
        is one.

    Raises ConfigError that names the file and the key.
    """
    settings = _read(source) if source else {}
    try:
        for dotted, value in (changes or {}).items():
            *path, key = dotted.split(".")
            table = settings
            for name in path:
                table = table.setdefault(name, {})
                if not isinstance(table, dict):
                    raise ConfigError(f"{dotted}: {name} is no table")
            table[key] = _value(value, dotted in TEXTS) if isinstance(value, str) else value
        _known("", settings, [f.name for f in fields(TrainConfig)])
        return TrainConfig(**settings)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}" if source else str(error)) from None


def packaged():
    """{name: path} of the configurations that come with the package."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.toml"))}


def _toml():
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError:
            raise ImportError("Python 3.10 reads TOML with tomli: pip install 'mamba-fast[train]'") from None
    return tomllib


def _read(source):
    path = packaged().get(str(source), Path(source))
    toml = _toml()
    try:
        return toml.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        names = ", ".join(packaged())
        raise ConfigError(f"{source}: no such file, and none of the package's: {names}") from None
    except OSError as error:
        raise ConfigError(f"{source}: expected a TOML file: {error.strerror}") from None
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: {error}") from None


def _value(text, is_text):
    """A TOML value where `text` is one, else the text itself; so too where a text is wanted."""
    toml = _toml()
    try:
        found = toml.loads(f"value = {text}")["value"]
    except toml.TOMLDecodeError:
        return text
    return text if is_text and not isinstance(found, str) else found


def _known(table, given, accepted):
    for key in given:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(accepted)}"
            raise ConfigError(f"unknown key {table + '.' if table else ''}{key}; {hint}")


def _typed(key, value, kind):
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{key}: expected {kind.__name__}, got {value!r}")
    return value
