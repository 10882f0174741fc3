"""The y that a backward of the scan writes once more, for a block that did not keep it."""

import pytest
import torch
from cases import at_precision
from scan_inputs import in_numpy, scan_inputs

from mamba_fast.ops.selective_scan import cuda_plan, cuda_scan
from mamba_fast.ops.selective_scan.arguments import normalise
from mamba_fast.ops.selective_scan.registration import _room
from mamba_ref.checks import bound, errors
from mamba_ref.selective_scan import selective_scan, selective_scan_numpy

LAYOUTS = {
    "rows": lambda y: y,
    "matrix": lambda y: y.transpose(0, 1).contiguous().transpose(0, 1),  # as the block has it
    "tokens": lambda y: y.mT.contiguous().mT,
    "sliced": lambda y: torch.nn.functional.pad(y, (3, 2))[..., 3:-2],
}
LENGTH = 70
PACKINGS = {
    "seq_idx": torch.tensor([[0] * 9 + [4] + [2] * 31 + [3] * 29]),
    "cu_seqlens": torch.tensor([0, 9, 9, 10, 32, 64, LENGTH]),
}


@pytest.fixture(params=[pytest.param(b, marks=getattr(pytest.mark, b)) for b in ("numba", "triton", "cuda")])
def backend(request):
    """Every fused backend in turn."""
    return request.param


def check(backend, device, inputs, dtype=torch.float32, layout="matrix", **packing):
    """Assert that y is the oracle's, the second time too, and that asking for it changes no bit beside it."""
    given = at_precision(at_precision(inputs, dtype), dtype, device)
    there = {k: v.to(device) for k, v in packing.items()}
    args = normalise(*given.values(), *(there.get(k) for k in PACKINGS))
    *tensors, state, seq, softplus, varlen, rows = args
    y, last, states = _room(backend).forward(*args, True)
    dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(dtype)

    def backward(again):
        return _room(backend).backward(
            dy, last, *tensors, seq, softplus, varlen, rows, states, state, True, y=again
        )

    again = LAYOUTS[layout](torch.full_like(y, torch.nan))
    grads, plain_grads = backward(again), backward(None)
    exact = in_numpy(at_precision(at_precision(given, torch.float64), torch.float64))
    truth = selective_scan_numpy(**exact, **{k: v.numpy() for k, v in packing.items()})
    limit = bound(selective_scan(**given, **there), truth)
    assert errors(y, truth)[1] <= limit
    assert errors(again, truth)[1] <= limit
    for got, want in zip(grads, plain_grads, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


@pytest.mark.parametrize(
    "seqlen, layout", [(1, "rows"), (33, "tokens"), (64, "matrix"), (100, "matrix"), (100, "sliced")]
)
def test_every_layout_and_length(backend, device, seqlen, layout):
    check(backend, device, scan_inputs(seqlen, 2, 6, seqlen, 3), layout=layout)


@pytest.mark.parametrize("dtype, layout", [(torch.bfloat16, "matrix"), (torch.float16, "sliced")])
def test_half_precision(backend, device, dtype, layout):
    check(backend, device, scan_inputs(1, 2, 6, 72, 3), dtype, layout)


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_rows(backend, device, packing):
    inputs = scan_inputs(2, 1, 17, LENGTH, 2, initial_state=False)
    check(backend, device, inputs, **{packing: PACKINGS[packing]})


@pytest.mark.parametrize("options", [{}, {"D": False, "delta_bias": False, "B": "constant", "C": "grouped"}])
def test_a_sequence_cut_into_stretches(backend, device, options, monkeypatch):
    """By cuda and by triton: one row of few channels does not fill a chip."""
    long = next(kind for (_, tokens), kind in cuda_plan.BACKWARD.items() if tokens > 2048)
    for table in ("BACKWARD", "BACKWARD_ROOMY"):
        monkeypatch.setattr(cuda_plan, table, {(0, 0): long})
    cuda_scan._backward_calls.cache_clear()
    needs = {"IO": 0, "N": 2, "HAS_Z": 1, "B_CONSTANT": 0, "C_CONSTANT": 0, "ORDERED": 0, "BUFFERS": 1}
    assert cuda_plan.cut_backward((1, 6, 300, 3, torch.device(device)), needs).stretches > 1
    check(backend, device, scan_inputs(3, 1, 6, 300, 2, **options))


def test_without_a_gate_there_is_nothing_to_write(backend, device):
    inputs = at_precision(scan_inputs(4, 1, 3, 9, 2, z=False), torch.float32, device)
    *tensors, state, seq, softplus, varlen, rows = args = normalise(*inputs.values(), None, None)
    y, last, states = _room(backend).forward(*args, True)
    again = torch.full_like(y, 7.0)
    _room(backend).backward(y, last, *tensors, seq, softplus, varlen, rows, states, state, False, y=again)
    assert (again == 7).all()
