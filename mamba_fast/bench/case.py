"""What a bench is made of: cases, the kernels that compete in each, and the least work a case can be."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Kernel:
    """One competitor. run(**tensors) returns a tensor or a tuple of tensors.

    role: "ours" (must pass the checks; the first one is what ratios refer to), "peer" (the published
    kernel: its errors are measured, not judged) or "other" (another way to do the job, timed alone).
    """

    name: str
    run: Callable
    role: str = "ours"
    backward: bool = True


@dataclass(frozen=True)
class View:
    """Parts of the tensors on which the truth is affordable and the tensors `keep` (None: all) are exact.

    part(name, tensor) cuts an input or an output; a gradient is cut as what it belongs to.
    """

    part: Callable = lambda name, tensor: tensor
    keep: tuple | None = None


@dataclass(frozen=True)
class Case:
    """One problem: its inputs, the competitors, the truth, and the least work in each direction.

    make(seed) returns fresh inputs by name. plain(**tensors) is the same function in plain PyTorch; at
    float64 it is the truth. work: per direction ("forward", "backward") the bytes that must move and the
    exponentials that must be taken.
    """

    name: str
    shape: tuple
    dtype: torch.dtype
    make: Callable
    kernels: list
    plain: Callable
    outputs: tuple = ("y",)
    views: tuple = (View(),)
    work: dict = field(default_factory=dict)
    backward: bool = True
    timed: bool = True
    thorough: bool = True  # also host time, memory, and the forward that keeps what a backward needs

    @property
    def title(self):
        return f"{self.name} {type_name(self.dtype)}"


def type_name(dtype):
    return str(dtype).removeprefix("torch.")


def as_tuple(out):
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def generator_of(seed, device):
    return torch.Generator(device).manual_seed(seed)
