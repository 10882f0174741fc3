"""What the block asks of PyTorch between its kernels: one product a projection, and no copies of rows."""

import collections
import sys

import pytest
import torch
from cases import device_of
from inner_inputs import NORMS, at_precision, inner_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_fast.ops.mamba_inner import _cast
from mamba_fast.ops.mamba_inner.parts import Settings, Tensors
from mamba_fast.ops.mamba_inner.registration import inner

BATCH, CHANNELS, SEQLEN = 2, 16, 64
ABSENT = (*NORMS, "B_proj_bias", "C_proj_bias")  # a Mamba block has none of these
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "dot"}
MEMORY = {"empty", "empty_like", "new_empty", "fill_"}  # fill_: the poison of tests/conftest.py


class Recorder(TorchDispatchMode):
    """The products of matrices, and what else writes as many numbers as (B, D, L) has, by name."""

    def __init__(self):
        super().__init__()
        self.products, self.writes = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            self.products[name] += 1
        elif name not in MEMORY and not function.is_view and not in_the_interpreter():
            numbers = out.numel() if isinstance(out, torch.Tensor) else 0
            self.writes[name] += numbers >= BATCH * CHANNELS * SEQLEN
        return out


def in_the_interpreter():
    """Whether Triton asks: its interpreter brings what a kernel is given to the CPU and back."""
    frame = sys._getframe(1)
    while frame and not frame.f_globals.get("__name__", "").startswith("triton."):
        frame = frame.f_back
    return frame is not None


def recorded(xz_of, level, conv, scan):
    """The records of forward and backward."""
    device = device_of(scan)
    inputs = inner_inputs(0, BATCH, CHANNELS, SEQLEN, 4, 3, absent=ABSENT)
    t = _cast(Tensors(*at_precision(inputs, torch.bfloat16, device).values()))
    t = Tensors(*(v if v is None else v.detach().requires_grad_() for v in t))
    t = t._replace(xz=xz_of(t.xz.detach()).requires_grad_())
    with Recorder() as forward:
        out = inner(t, Settings(True, level, 1e-6, conv, scan))
    assert out.is_contiguous()
    dout = torch.randn_like(out)
    with Recorder() as backward:
        out.backward(dout)
    assert all(v is None or v.grad.isfinite().all() for v in t)
    return forward, backward


EVERY_ROOM = [
    pytest.param("torch", "numba", marks=pytest.mark.numba),
    pytest.param("triton", "triton", marks=pytest.mark.triton),
    pytest.param("triton", "cuda", marks=[pytest.mark.triton, pytest.mark.cuda]),
]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("conv, scan", EVERY_ROOM)
def test_one_product_a_projection(conv, scan, level):
    """Forward three; backward two a projection, and at level 1 delta once more. None a batch element."""
    forward, backward = recorded(torch.clone, level, conv, scan)
    assert forward.products == {"mm": 2, "addmm": 1}  # out_proj has a bias
    assert backward.products == {"mm": 5 + level, "addmm_": 1}  # du is added to in place


def as_in_proj_leaves_it(xz):
    return xz.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("xz_of", [as_in_proj_leaves_it, torch.clone])
@pytest.mark.parametrize("conv, scan", EVERY_ROOM[1:])
def test_only_kernels_and_products_write_rows(conv, scan, xz_of, level):
    """Nothing in PyTorch copies, casts or adds a (B, D, L) between them, from either layout of xz."""
    for record in recorded(xz_of, level, conv, scan):
        assert +record.writes == {}
