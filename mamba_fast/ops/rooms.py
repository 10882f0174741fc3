"""Which room of an operator takes a call: Triton on a GPU, plain PyTorch everywhere else."""

import contextlib
import importlib.util
import warnings

import torch

from mamba_fast.ops.selective_scan.backends import interpreted

NAMES = ("torch", "triton")


def choose(operator, x, tensors, backend, obstacle=None):
    """The room of this call, "triton" or "torch"; ValueError if `backend` cannot take it.

    x decides the device; `tensors` are all that take part, None where absent. `obstacle` is a reason
    of the operator's own against Triton.
    """
    if backend == "torch" or (backend is None and (not x.is_cuda or x.numel() == 0)):
        return "torch"
    if backend not in (None, "triton"):
        raise ValueError(f"backend: expected None or one of {', '.join(NAMES)}, got {backend!r}")
    obstacle = obstacle or _obstacle(x, tensors)
    if obstacle is None:
        return "triton"
    if backend is not None:
        raise ValueError(f"backend: {backend!r} cannot take this call: {obstacle}")
    if not _TRITON:
        _warn_once(operator)
    return "torch"


def is_plain(*tensors):
    """Whether autograd alone watches a call on these tensors, None where absent: no compiler, no tracer,
    no transform of torch.func, no subclass.

    Such a call needs no operator, whose dispatch costs host time: `torch.autograd.Function` will do.
    """
    return (
        not torch.compiler.is_compiling()
        and _PLAIN.issuperset(map(type, tensors))
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None  # make_fx
        and not torch.jit.is_tracing()
    )


def on_device_of(x):
    """The context in which Triton launches on x's device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def shared_limit(device):
    """Bytes of SRAM that a block, or program, may have at most; without a GPU as much as an H100's."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def multiprocessors(x):
    """How many programs x's device runs side by side at least; 1 in the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _obstacle(x, tensors):
    """Why Triton cannot take a call, or None."""
    if not _TRITON:
        return "triton is not installed (extra 'triton')"
    if not x.is_cuda and not interpreted():
        return f"it needs a GPU (or TRITON_INTERPRET=1), and x is on {x.device}"
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return "it computes in float32, and an argument is float64"
    return "x is empty" if x.numel() == 0 else None


def _warn_once(operator):
    """One warning in a process and operator when only an extra is missing."""
    if operator not in _warned:
        _warned.add(operator)
        warnings.warn(
            f"{operator} runs on the torch backend, which is slow on a GPU: install the extra 'triton' "
            "(pip install 'mamba-fast[triton]') for the fused one",
            stacklevel=4,
        )


def _installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module blocked by sys.modules[name] = None
        return False


_TRITON = _installed("triton")
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}
_HERE = contextlib.nullcontext()
_warned = set()
