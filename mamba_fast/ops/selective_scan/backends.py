"""Which backend a call takes, and why."""

import functools
import importlib.util
import os
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mamba_fast import nvrtc

NAMES = ("torch", "numba", "triton", "cuda")


@dataclass(frozen=True)
class BackendChoice:
    """The backend a call takes, the reason, and why each other backend does not take it."""

    name: str
    reason: str
    others: dict[str, str]
    missing_extra: str | None = None

    def __str__(self):
        lines = [f"{self.name}: {self.reason}", *(f"  not {k}: {v}" for k, v in self.others.items())]
        return "\n".join(lines)


def available_backends(device=None):
    """Names of the backends that can run here on `device` (default: cuda if there is one, else cpu).

    The first one is what ``backend=None`` takes for real input of at most 32 bits.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    usable = [name for name in ("cuda", "triton", "numba", "torch") if _obstacle(name, device) is None]
    first = _preferred(device, usable)
    return [first, *(name for name in usable if name != first)]


def choose(u, A, backend=None):
    """The :class:`BackendChoice` for these inputs; ValueError if `backend` cannot take them."""
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(NAMES)}, got {backend!r}")
    states = A.shape[1] if A.dim() == 2 else None
    kind = Kind(u.device, u.dtype, A.is_complex(), states, u.numel() == 0)
    if interpreted() or not isinstance(states, (int, type(None))):
        return _choose(kind, backend)
    return _choose_once(kind, backend)


def name_for_compiler(device, dtype, curled, states, empty, backend):
    """The name of the backend alone, worked out while torch.compile traces and a constant in its graph."""
    return _choose(Kind(device, dtype, curled, states, empty), backend).name


name_for_compiler._dynamo_marked_constant = True


class Kind(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    curled: bool  # complex A
    states: int | None
    empty: bool


def _choose(kind, backend):
    obstacles = {name: _obstacle(name, kind.device, kind) for name in NAMES}
    if backend is not None:
        if obstacles[backend]:
            raise ValueError(f"backend: {backend!r} cannot take this call: {obstacles[backend]}")
        others = {name: "another backend was asked for" for name in NAMES if name != backend}
        return BackendChoice(backend, "asked for by name", others)
    if kind.empty:  # plain PyTorch knows every empty shape
        obstacles = {n: obstacles[n] or (None if n == "torch" else "there is nothing to scan") for n in NAMES}
    usable = [name for name in NAMES if obstacles[name] is None]
    name = _preferred(kind.device, usable)
    others = {n: obstacles[n] or f"{name} comes first on {kind.device.type}" for n in NAMES if n != name}
    return BackendChoice(name, _REASONS[name], others, _missing_extra(name, kind))


_choose_once = functools.lru_cache(maxsize=1024)(_choose)


def warn_once_if_missing(choice):
    """One warning in a process when a faster backend only lacks an installed extra."""
    if choice.missing_extra and choice.missing_extra not in _warned:
        _warned.add(choice.missing_extra)
        warnings.warn(
            f"selective_scan runs on the {choice.name} backend, which is slower than it could be: "
            f"pip install 'mamba-fast[{choice.missing_extra}]' brings the fastest one",
            stacklevel=3,
        )


MAX_STATES = 256  # of the cuda backend: what fits in shared memory
_warned = set()
_EXTRAS = {"numba": "cpu", "triton": "triton", "cuda": "cuda"}
_LIBRARIES = {"cuda": "cuda-core"}
_REASONS = {
    "torch": "plain PyTorch takes every device and type",
    "numba": "real input on a CPU, and numba is installed",
    "triton": "real input on a GPU, and triton is installed",
    "cuda": "real input on an NVIDIA GPU of compute capability 8.0 or later, and cuda-core is installed",
}


@functools.cache
def _installed(name):
    """Whether the library of a backend can be imported."""
    if name == "cuda":
        return nvrtc.available()
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module blocked by sys.modules[name] = None
        return False


def interpreted():
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(name, device, kind=None):
    """Why this backend can't run here, or can't take this kind of call; else None."""
    if name == "torch":
        return None
    if name == "cuda" and (reason := cuda_obstacle(device)):
        return reason
    if not _installed(name):
        return f"{_LIBRARIES.get(name, name)} is not installed (extra '{_EXTRAS[name]}')"
    if name == "numba" and device.type != "cpu":
        return f"it runs on a CPU, and u is on {device}"
    if name == "triton" and device.type != "cuda" and not interpreted():
        return f"it needs a GPU (or TRITON_INTERPRET=1), and u is on {device}"
    if kind is not None and kind.dtype == torch.float64:
        return "its state is float32, and u is float64"
    if kind is not None and kind.curled:
        return "complex A runs on the torch backend alone"
    if kind is not None and name == "cuda" and (kind.states or 0) > MAX_STATES:
        return f"it holds at most {MAX_STATES} states a channel, and A has {kind.states}"
    return None


def cuda_obstacle(device):
    """Why the kernels of the cuda backend cannot run on this device, or None."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, and u is on {device}"
    if torch.version.hip or not torch.cuda.is_available():
        return "it needs an NVIDIA GPU that torch can use"
    found = _capability(device.index if device.index is not None else torch.cuda.current_device())
    return (
        None
        if found >= (8, 0)
        else f"it needs compute capability 8.0, and {device} has {found[0]}.{found[1]}"
    )


@functools.cache
def _capability(index):
    return torch.cuda.get_device_capability(index)


def _preferred(device, usable):
    order = ("cuda", "triton", "torch") if device.type == "cuda" else ("numba", "torch")
    return next(name for name in order if name in usable)


def _missing_extra(name, kind):
    """The extra that would bring a faster backend for this call, where nothing else stands against it."""
    if kind.dtype == torch.float64 or kind.curled or kind.empty:
        return None
    for wanted in {"cpu": ("numba",), "cuda": ("cuda", "triton")}.get(kind.device.type, ()):
        if wanted == name:
            return None
        if not _installed(wanted) and (wanted != "cuda" or cuda_obstacle(kind.device) is None):
            return _EXTRAS[wanted]
    return None
