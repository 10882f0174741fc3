"""Triton launches that are prepared once.

`kernel[grid](...)` looks at every argument anew to find the compiled form that fits them, which can take
the host longer than a small kernel runs. A `Launch` goes that way once and keeps what came of it.
Afterwards it hands new addresses to the same form.
"""

import functools
import operator
from typing import NamedTuple

import torch
import triton

# Versions whose CompiledKernel.run(grid, stream, function, metadata, hooks and arguments) was read.
_KNOWN = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])
if _KNOWN:
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver


class Look(NamedTuple):
    """What a launch depends on of a tensor, but for the place where it lies."""

    shape: torch.Size
    strides: tuple
    dtype: torch.dtype


def looks(*tensors):
    """A :class:`Look` of each as a plain tuple, None for None: a key that costs little to make."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors])


def named(looks):
    return [None if v is None else Look(*v) for v in looks]


class Launch:
    """A kernel with its grid and all arguments behind the tensors; call it with the tensors.

    From call to call their types, and which of them are None, have to be the same: make a Launch in a
    cached function of their `looks`. Device, stream and alignment may change. A call does what
    `kernel[grid](*tensors, *args, **options)` does, and does it in this way wherever Triton's own launch is
    asked for (hooks, debugging, interpreter) or unknown (other versions, other backends).
    """

    def __init__(self, kernel, grid, *args, **options):
        self.kernel, self.grid, self.args, self.options = kernel, grid, args, options
        self._forms = {}

    def __call__(self, *tensors):
        if self._forms and not _observed(self.kernel):
            active = driver.active
            pointers = [0 if t is None else t.data_ptr() for t in tensors]
            device = active.get_current_device()
            form = self._forms.get(_key(device, pointers))
            if form is not None and form.current():
                form.run(*form.grid, active.get_current_stream(device), *form.head, *pointers, *form.tail)
                return
        built = self.plain(*tensors)
        if _KNOWN and isinstance(built, CompiledKernel) and built.metadata.target.backend == "cuda":
            if not _observed(self.kernel):
                pointers = [0 if t is None else t.data_ptr() for t in tensors]
                key = _key(driver.active.get_current_device(), pointers)
                self._forms[key] = _Form(self, built, len(tensors))

    def plain(self, *tensors):
        """The same launch as Triton makes it."""
        return self.kernel[self.grid](*tensors, *self.args, **self.options)


class _Form:
    """A compiled kernel and what its launcher takes around stream and addresses."""

    def __init__(self, launch, built, tensors):
        names = launch.kernel.arg_names[tensors + len(launch.args) :]
        self.run, self.grid = built.run, (*launch.grid, 1, 1)[:3]
        self.head = (built.function, built.packed_metadata, None, None, None)  # without metadata for hooks
        self.tail = (*launch.args, *(launch.options[name] for name in names))
        used = launch.kernel.used_global_vals
        self.globals = [(scope, name, scope.get(name)) for (name, _), (_, scope) in used.items()]

    def current(self):
        """Whether the globals that were compiled in are still the same; if not, Triton raises an error."""
        return all([scope.get(name) is value for scope, name, value in self.globals])


def _key(device, pointers):
    """The device where all pointers are aligned at 16 bytes, as they mostly are; else which of them are."""
    if functools.reduce(operator.or_, pointers) % 16 == 0:
        return device
    return device, *(p % 16 == 0 for p in pointers)


def _observed(kernel):
    """Whether a profiler, a debugger or a hook wants launches, or compiled forms, of its own."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    )
