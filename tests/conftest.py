"""Triton's interpreter where there is no GPU, poisoned memory, and the backends this machine can test."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

with torch.device("meta"):  # torch lists its constructors at first use: before they are patched below
    torch.empty(0)

_NEEDS = {
    "gpu": torch.cuda.is_available(),
    **{m: bool(importlib.util.find_spec(m)) for m in ("triton", "numba")},
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
    ]
)
def backend(request):
    """Every backend in turn, skipped where it cannot run."""
    return request.param


@pytest.fixture
def device(backend):
    """Where this backend is tested: Triton on the GPU if there is one, everything else on the CPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh float memory holds NaN, so that an element nobody wrote cannot look right."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() or out.is_complex() else out

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
