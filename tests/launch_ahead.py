"""Prepared launches beside Triton's own, on a driver that takes notes instead of launching: without a GPU.

    PYTHONPATH=.:tests TRITON_INTERPRET=0 python tests/launch_ahead.py

Kernels are compiled for a real architecture and go through all of Triton but the C function at its end: what
that is given is noted. Prints a JSON object a check: its name, and what failed or null.
"""

import contextlib
import itertools
import json
import sys
import traceback

import pytest
import torch
import triton
import triton.language as tl
from launch_inputs import CONVS, NORMS, UPDATES, conv, norm, unaligned, update
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mamba_fast.ops import triton_launch
from mamba_fast.ops.causal_conv1d import triton_conv
from mamba_fast.ops.rms_norm import triton_norm
from mamba_fast.ops.selective_state_update import triton_update
from mamba_fast.ops.triton_launch import Launch

FACTOR = tl.constexpr(3)
OWN, PREPARED = True, False  # whose launch it was


@triton.jit
def scale_kernel(x_ptr, y_ptr, absent_ptr, strides, total, factor, BLOCK: tl.constexpr):
    """y = x times factor, and times FACTOR."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * strides[0], mask=i < total)
    if absent_ptr is None:
        x *= FACTOR
    tl.store(y_ptr + i * strides[1], x * factor, mask=i < total)


class Driver:
    """What Triton asks of a driver for an NVIDIA GPU, with two of these; `notes` has a line a launch."""

    def __init__(self):
        self.device, self.streams, self.notes = 0, {0: 70, 1: 71}, []
        self.functions = itertools.count()
        self.utils, self.launcher_cls = self, self.launcher

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.streams[device]

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name, binary, shared, device):
        return object(), next(self.functions), 0, 0, 1024

    def launcher(self, source, metadata):
        signature = tuple(source.signature.values())

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
            for hook in (enter, leave):
                if hook is not None:
                    hook(launch_metadata)
            self.notes.append(((x, y, z), stream, function, packed, *flat(signature, args)))

        return launch


def flat(signature, args):
    """The kernel's arguments, as the C function finds them: tuples opened, constants left out."""
    for kind, value in zip(signature, args, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        elif kind != "constexpr":
            yield value.data_ptr() if isinstance(value, torch.Tensor) else value


DRIVER, RUNS, COMPARED = Driver(), [], set()


def noted(call, *tensors):
    """The one launch that a call makes, and whether it was Triton's own."""
    DRIVER.notes.clear()
    RUNS.clear()
    call(*tensors)
    (note,) = DRIVER.notes
    return note, bool(RUNS)


def owners(launch, *tensors, times=2):
    return [noted(launch, *tensors)[1] for _ in range(times)]


@contextlib.contextmanager
def changed(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def comparing():
    """The context in which each launch is made again, prepared now, and again as Triton does."""
    call = Launch.__call__

    def calls(self, *tensors):
        first, _ = noted(call, self, *tensors)
        again, owner = noted(call, self, *tensors)
        plain, _ = noted(self.plain, *tensors)
        assert owner == PREPARED
        assert first == again == plain, "\n".join(map(str, (first, again, plain)))
        COMPARED.add(self.kernel.__name__)

    return changed(Launch, "__call__", calls)


def scale():
    """A launch of the little kernel, and its tensors."""
    launch = Launch(scale_kernel, (2,), (1, 16), 100, 0.5, BLOCK=64, num_warps=2)
    return launch, torch.ones(100), torch.ones(1600), None


def check_the_norms():
    with comparing():
        for options in NORMS:
            norm(**options)[0]()


def check_the_convolutions():
    with comparing():
        for options in CONVS:
            conv(**options)[0]()


def check_the_updates():
    with comparing():
        for options in UPDATES:
            update(**options)[0]()


def check_every_kernel_was_compared():
    rooms = vars(triton_norm) | vars(triton_conv) | vars(triton_update)
    left = {"reach_kernel", "conv_update_kernel", "conv_states_kernel"}
    assert {name for name in rooms if name.endswith("_kernel")} - left == COMPARED


def check_each_alignment_has_its_form():
    launch, x, y, _ = scale()
    functions = set()
    for tensors in ((x, y), (unaligned(x), y), (x, unaligned(y))):
        assert owners(launch, *tensors, None) == [OWN, PREPARED]
        note, owner = noted(launch, *tensors, None)
        assert (note, owner) == (noted(launch.plain, *tensors, None)[0], PREPARED)
        functions.add(note[2])
    assert len(functions) == 3


def check_each_device_has_its_form():
    launch, *tensors = scale()
    assert owners(launch, *tensors) == [OWN, PREPARED]
    with changed(DRIVER, "device", 1):
        assert owners(launch, *tensors) == [OWN, PREPARED]
        assert noted(launch, *tensors)[0] == noted(launch.plain, *tensors)[0]
    assert noted(launch, *tensors)[0] == noted(launch.plain, *tensors)[0]


def check_the_stream_is_that_of_the_moment():
    launch, *tensors = scale()
    launch(*tensors)
    with changed(DRIVER, "streams", {0: 5}):
        note, owner = noted(launch, *tensors)
    assert (note[1], owner) == (5, PREPARED)


def check_hooks_see_each_launch():
    launch, *tensors = scale()
    launch(*tensors)
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(knobs.runtime, name)
        chain.add(hook)
        assert owners(launch, *tensors) == [OWN, OWN]
        chain.remove(hook)
        assert owners(launch, *tensors) == [PREPARED, PREPARED]
        with changed(knobs.runtime, name, hook):
            assert owners(launch, *tensors) == [OWN, OWN]
    assert seen == 8 * ["scale_kernel"]
    scale_kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(len(args)))
    assert owners(launch, *tensors) == [OWN, OWN]
    scale_kernel.pre_run_hooks.clear()
    assert seen[8:] == [6, 6]


def check_a_form_for_another_purpose_is_neither_used_nor_kept():
    for owner, name, value in (
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "another"),
        (knobs.runtime, "add_stages_inspection_hook", lambda *args: ("key", "hash")),
    ):
        launch, *tensors = scale()
        with changed(owner, name, value):
            assert owners(launch, *tensors) == [OWN, OWN]
        assert owners(launch, *tensors) == [OWN, PREPARED]
        with changed(owner, name, value):
            assert owners(launch, *tensors) == [OWN, OWN]


def check_a_changed_global_is_an_error():
    launch, *tensors = scale()
    launch(*tensors)
    with changed(sys.modules[__name__], "FACTOR", tl.constexpr(4)):
        with pytest.raises(RuntimeError, match="FACTOR has changed"):
            launch(*tensors)
    assert owners(launch, *tensors) == [PREPARED, PREPARED]


def check_an_unknown_version_launches_itself():
    launch, *tensors = scale()
    with changed(triton_launch, "_KNOWN", False):
        assert owners(launch, *tensors, times=3) == [OWN, OWN, OWN]


def run(check):
    try:
        check()
    except (Exception, pytest.fail.Exception):
        return traceback.format_exc()
    return None


def counted(launch):
    """Triton's own launch, with a line in RUNS for each."""

    def call(self, *args, **kwargs):
        RUNS.append(self)
        return launch(self, *args, **kwargs)

    return call


if __name__ == "__main__":
    driver.set_active(DRIVER)
    JITFunction.run = counted(JITFunction.run)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            print(json.dumps({"check": name.removeprefix("check_"), "failed": run(check)}))
