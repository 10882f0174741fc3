"""Which backend a call takes, and why."""

import importlib.util
import os
import warnings
from dataclasses import dataclass

import torch

NAMES = ("torch", "numba", "triton")


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
    usable = [name for name in ("triton", "numba", "torch") if _obstacle(name, device) is None]
    first = _preferred(device, usable)
    return [first, *(name for name in usable if name != first)]


def choose(u, A, backend=None):
    """The :class:`BackendChoice` for these inputs; ValueError if `backend` cannot take them."""
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(NAMES)}, got {backend!r}")
    obstacles = {name: _obstacle(name, u.device, u, A) for name in NAMES}
    if backend is not None:
        if obstacles[backend]:
            raise ValueError(f"backend: {backend!r} cannot take this call: {obstacles[backend]}")
        others = {name: "another backend was asked for" for name in NAMES if name != backend}
        return BackendChoice(backend, "asked for by name", others)
    if u.numel() == 0:  # plain PyTorch knows every empty shape
        obstacles = {n: obstacles[n] or (None if n == "torch" else "there is nothing to scan") for n in NAMES}
    usable = [name for name in NAMES if obstacles[name] is None]
    name = _preferred(u.device, usable)
    others = {n: obstacles[n] or f"{name} comes first on {u.device.type}" for n in NAMES if n != name}
    return BackendChoice(name, _REASONS[name], others, _missing_extra(name, u, A))


def warn_once_if_missing(choice):
    """One warning in a process when a faster backend only lacks an installed extra."""
    if choice.missing_extra and choice.missing_extra not in _warned:
        _warned.add(choice.missing_extra)
        warnings.warn(
            f"selective_scan runs on the {choice.name} backend, which is slow: install the extra "
            f"'{choice.missing_extra}' (pip install 'mamba-fast[{choice.missing_extra}]') for the fused one",
            stacklevel=3,
        )


_warned = set()
_REASONS = {
    "torch": "plain PyTorch takes every device and type",
    "numba": "real input on a CPU, and numba is installed",
    "triton": "real input on a GPU, and triton is installed",
}


def _installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module blocked by sys.modules[name] = None
        return False


def interpreted():
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(name, device, u=None, A=None):
    """Why this backend can't run here, or None."""
    if name == "torch":
        return None
    if not _installed(name):
        return f"{name} is not installed (extra '{'cpu' if name == 'numba' else 'triton'}')"
    if name == "numba" and device.type != "cpu":
        return f"it runs on a CPU, and u is on {device}"
    if name == "triton" and device.type != "cuda" and not interpreted():
        return f"it needs a GPU (or TRITON_INTERPRET=1), and u is on {device}"
    if u is not None and u.dtype == torch.float64:
        return "its state is float32, and u is float64"
    if A is not None and A.is_complex():
        return "complex A runs on the torch backend alone"
    return None


def _preferred(device, usable):
    order = ("triton", "torch") if device.type == "cuda" else ("numba", "torch")
    return next(name for name in order if name in usable)


def _missing_extra(name, u, A):
    """The extra whose absence is the only reason for plain PyTorch, if so."""
    if name != "torch" or u.dtype == torch.float64 or A.is_complex() or u.numel() == 0:
        return None
    wanted = {"cpu": ("numba", "cpu"), "cuda": ("triton", "triton")}.get(u.device.type)
    return wanted[1] if wanted and not _installed(wanted[0]) else None
