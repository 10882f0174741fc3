"""What a slice hands on, by every backend, against scans of the reference; and how slices add up."""

import itertools

import pytest
import torch
from scan_inputs import scan_inputs

from mamba_fast.ops.selective_scan import slices
from mamba_fast.ops.selective_scan.arguments import normalise
from mamba_ref.checks import bounds, check
from mamba_ref.selective_scan import selective_scan


def arguments(inputs, dtype, device):
    """Normalised arguments: A, the bias and a constant B or C in float32, the rest in `dtype`."""
    wide = ("A", "delta_bias", *(k for k in "BC" if inputs[k].dim() == 2))
    u, delta, A, B, C, z, bias = (
        v.to(device, torch.float32 if k in wide else dtype) for k, v in inputs.items()
    )
    return normalise(u, delta, A, B, C, None, z, bias, True, None, None, None)


def by_scans(inputs, dy, dtype):
    """A slice's local, total and flow by the reference's loop: a last state, and a gradient of the first."""
    given = {k: v.to(dtype) for k, v in inputs.items()}
    start = torch.zeros(*given["u"].shape[:2], given["A"].shape[1], dtype=dtype, requires_grad=True)
    y, local = selective_scan(
        **given, delta_softplus=True, return_last_state=True, initial_state=start
    )  # fmt: skip
    (flow,) = torch.autograd.grad((y * dy.to(dtype)).sum(), start)
    total = torch.nn.functional.softplus(given["delta"] + given["delta_bias"][:, None]).sum(-1)
    return {"local": local.detach(), "total": total, "flow": flow, "total again": total}


CASES = [
    ((2, 6, 1, 3), "variable", "variable", torch.float32),
    ((1, 9, 130, 4), "variable", "variable", torch.bfloat16),
    ((2, 6, 65, 2), "grouped", "constant", torch.float32),
    ((1, 3, 600, 2), "constant", "variable", torch.float32),  # few channels: CUDA in several stretches
]


@pytest.mark.parametrize("shape, B, C, dtype", CASES)
def test_the_summary_of_a_slice(backend, device, shape, B, C, dtype):
    inputs = scan_inputs(1, *shape, B=B, C=C, groups=3)
    inputs = {k: inputs[k] for k in ("u", "delta", "A", "B", "C", "z", "delta_bias")}
    inputs = {k: v if k in ("A", "delta_bias") or v.dim() == 2 else v.to(dtype) for k, v in inputs.items()}
    dy = torch.randn(shape[:3], generator=torch.Generator().manual_seed(2)).to(dtype)

    args = arguments(inputs, dtype, device)
    given = args.A, args.B, None, args.delta_bias, False, backend
    local, total = slices.summary(args.u, args.delta, *given)
    given = args.A, args.C, args.z, args.delta_bias, True, backend
    flow, again = slices.summary(dy.to(device), args.delta, *given)
    got = {"local": local, "total": total, "flow": flow, "total again": again}
    want, plain = by_scans(inputs, dy, torch.float64), by_scans(inputs, dy, torch.float32)
    limits = bounds(plain, want)
    for name, value in want.items():
        assert value.abs().max() > 0
        check(name, got[name], value, limits[name])


@pytest.mark.parametrize("reverse", [False, True])
def test_slices_add_up(reverse):
    """The summaries of five pieces, chained one way or the other, are that of the whole."""
    inputs = scan_inputs(3, 2, 4, 41, 3)
    u, delta, A, B, C, z = (inputs[k] for k in ("u", "delta", "A", "B", "C", "z"))
    x, M, gate = (u.flip(1), C[:, None], z) if reverse else (u, B[:, None], None)

    def of(t):
        part = None if gate is None else gate[..., t]
        given = A, M[..., t], part, inputs["delta_bias"], reverse, "torch"
        return slices.summary(x[..., t], delta[..., t], *given)

    pieces = [of(slice(a, b)) for a, b in itertools.pairwise((0, 7, 8, 20, 33, 41))]
    local, total = slices.behind(A, *(torch.stack(v, 1) for v in zip(*pieces, strict=True)), reverse)
    for name, got, want in zip(("local", "total"), (local, total), of(slice(None)), strict=True):
        check(name, got, want, 2.0**-45)
