"""Watch a rung run: every number its programs load and store, and every byte its torch passes move.

Triton's interpreter executes each load and store as a Python call, so the traffic that a rung's header
predicts can be counted instead of believed. It needs TRITON_INTERPRET=1 and tensors on the CPU:

    with trace() as log:
        k3.selective_scan(u, delta, A, B, C)
    log.bytes, log.by_tensor(), log.sector_bytes
"""

from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SECTOR = 32  # bytes: the smallest piece that a GPU's memory hands over


class Access(NamedTuple):
    """One load or store of one program: `tensor` is the kernel's argument, `index` its elements touched."""

    launch: int
    program: tuple
    write: bool
    tensor: str
    index: np.ndarray
    itemsize: int


class Pass(NamedTuple):
    """One torch operator: it reads its arguments from memory and writes its result there."""

    name: str
    read: int
    written: int


class Trace:
    """What ran between entering and leaving `trace()`: `launches`, `accesses` and torch `passes`."""

    def __init__(self):
        self.launches, self.accesses, self.passes, self.arguments = [], [], [], []
        self.outside = 0  # loads and stores that leave the kernel's arguments

    def record(self, program, write, addresses):
        if not addresses.size:
            return
        launch, addresses = len(self.launches) - 1, addresses.astype(np.int64)
        for name, x in self.arguments[launch].items():
            size = x.element_size()
            index = np.unique((addresses - x.data_ptr()) // size)
            inside = (index >= 0) & (index < x.numel())
            if inside.any():
                self.accesses.append(Access(launch, program, write, name, index[inside], size))
                self.outside += not inside.all()
                return
        self.outside += 1

    @property
    def bytes(self):
        """Bytes loaded and stored by all programs, and read and written by the torch passes."""
        return sum(sum(pair) for pair in self.by_tensor().values())

    @property
    def sector_bytes(self):
        """The same if memory hands over whole sectors to each load and store, and no cache helps."""
        sectors = sum(len(np.unique(a.index * a.itemsize // SECTOR)) for a in self.accesses)
        return sectors * SECTOR + sum(p.read + p.written for p in self.passes)

    @property
    def programs(self):
        """The number of programs of the largest launch."""
        return max(int(np.prod(grid)) for _, grid in self.launches)

    def by_tensor(self):
        """Bytes (read, written) for each kernel argument, and for the torch passes together."""
        total = {}
        for a in self.accesses:
            read, written = total.get(a.tensor, (0, 0))
            size = len(a.index) * a.itemsize
            total[a.tensor] = (read, written + size) if a.write else (read + size, written)
        if self.passes:
            total["torch"] = (sum(p.read for p in self.passes), sum(p.written for p in self.passes))
        return total

    def writers(self, tensor, shape):
        """Who wrote each element of `tensor`, and as its how-manieth store: two int arrays of `shape`."""
        program, turn = np.full(int(np.prod(shape)), -1), np.full(int(np.prod(shape)), -1)
        numbers, turns = {}, {}
        for a in self.accesses:
            if a.write and a.tensor == tensor:
                number = numbers.setdefault((a.launch, a.program), len(numbers))
                turns[number] = turns.get(number, -1) + 1
                program[a.index], turn[a.index] = number, turns[number]
        return program.reshape(shape), turn.reshape(shape)


class _Passes(TorchDispatchMode):
    """Adds every torch operator that moves data to `log.passes`, but not the interpreter's own."""

    def __init__(self, log):
        super().__init__()
        self.log, self.paused = log, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        is_view = any(a is not None and not a.is_write for a in aliases)
        if not self.paused and not is_view and "empty" not in func.__name__:
            shape_only = "new_" in func.__name__ or "_like" in func.__name__  # of a tensor that is not read
            leaves = [] if shape_only else tree_leaves((args, kwargs))
            read = sum(_size(x) for x in leaves if isinstance(x, torch.Tensor))
            written = sum(_size(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            if written:
                self.log.passes.append(Pass(func.__name__, read, written))
        return out


def _size(x):
    """Bytes of the distinct elements of x: a broadcast axis (stride 0) is read once."""
    return x.element_size() * int(np.prod([n for n, step in zip(x.shape, x.stride(), strict=True) if step]))


@contextmanager
def trace():
    """Record the traffic of everything that runs inside; yields a `Trace`.

    It wraps three functions of Triton's interpreter (the same in 3.6 to 3.9) and puts them back.
    """
    from triton.runtime import interpreter

    log, builder, run = Trace(), interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store

    def traced_load(ptrs, mask, *rest):
        log.record(builder.grid_idx, False, ptrs.data[mask.data])
        return load(ptrs, mask, *rest)

    def traced_store(ptrs, value, mask, *rest):
        log.record(builder.grid_idx, True, ptrs.data[mask.data])
        return store(ptrs, value, mask, *rest)

    def traced_run(executor, *args, **kwargs):
        named = zip(executor.arg_names, args, strict=False)
        log.arguments.append({k.removesuffix("_ptr"): x for k, x in named if isinstance(x, torch.Tensor)})
        log.launches.append((executor.fn.__name__, tuple(executor.grid)))
        passes.paused = True
        run(executor, *args, **kwargs)
        passes.paused = False

    with (
        _Passes(log) as passes,
        mock.patch.object(builder, "create_masked_load", traced_load),
        mock.patch.object(builder, "create_masked_store", traced_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", traced_run),
    ):
        yield log
