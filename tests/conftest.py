"""Triton's interpreter without a GPU, poisoned memory, plain figures, and which backends to test here."""

import importlib.util
import os
import shutil
import sys

import pytest
import torch
from cases import device_of
from cuda_emulator import EmulatedKernel

from mamba_fast import nvrtc
from mamba_fast.ops.selective_scan import backends

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used: for equal bits
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

with torch.device("meta"):  # torch lists its constructors at first use: before they are patched below
    torch.empty(0)

_NEEDS = {
    "gpu": torch.cuda.is_available(),
    **{m: bool(importlib.util.find_spec(m)) for m in ("triton", "numba")},
    "cuda": torch.cuda.is_available() or bool(shutil.which("g++")),  # without a GPU: emulated
}


def pytest_collection_modifyitems(items):
    """Skip what needs something this machine does not have; the reason is in the marker's name."""
    for item in items:
        for name, present in _NEEDS.items():
            if not present and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"this machine has no {name}"))


@pytest.fixture(
    params=[
        "torch",
        pytest.param("numba", marks=pytest.mark.numba),
        pytest.param("triton", marks=pytest.mark.triton),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def backend(request):
    """Every backend in turn, skipped where it cannot run."""
    return request.param


@pytest.fixture
def device(backend):
    """Where this backend is tested: the GPU kernels on a GPU if there is one, everything else on the CPU."""
    return device_of(backend)


@pytest.fixture(autouse=True)
def emulated_cuda(request, monkeypatch):
    """Without a GPU the CUDA kernels run on the CPU, compiled by g++ against tests/emulated_machine.h."""
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        monkeypatch.setattr(nvrtc, "Kernel", EmulatedKernel)
        monkeypatch.setattr(backends, "cuda_obstacle", lambda device: None)
        backends._choose_once.cache_clear()
        yield
        backends._choose_once.cache_clear()
    else:
        yield


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh float memory holds NaN, so that an element nobody wrote cannot look right."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.is_floating_point() or out.is_complex():
                out.detach().fill_(float("nan"))  # a leaf may ask for gradients
            return out

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def plain_figures():
    """A test that draws in the project's style leaves matplotlib as the next test expects it."""
    yield
    if matplotlib := sys.modules.get("matplotlib"):
        matplotlib.rcdefaults()
