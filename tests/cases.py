"""The grid of shapes, and one function that holds an implementation to the reference, tensor by tensor."""

import torch
from scan_inputs import in_numpy

from mamba_fast import selective_scan_fn
from mamba_ref.checks import Row, bounds, errors
from mamba_ref.selective_scan import selective_scan, selective_scan_numpy

SEQLENS = (1, 2, 31, 33, 63, 64, 65, 100)
FLOAT32 = ("A", "D", "delta_bias", "initial_state")  # whatever the type of the tokens


def device_of(backend):
    """Where a backend is tested: the GPU kernels on a GPU if there is one, everything else on the CPU."""
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def at_precision(inputs, dtype, device="cpu"):
    """Inputs in the types of the contract: tokens and variable B, C in `dtype`, the rest at least float32."""
    wide = torch.promote_types(dtype, torch.float32)

    def cast(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        to = wide if name in FLOAT32 or value.dim() == 2 else dtype
        return value.to(device, to.to_complex() if value.is_complex() else to)

    return {name: cast(name, value) for name, value in inputs.items()}


def outcome(function, inputs, weights=None, **options):
    """y, last_state and, with weights (of y, of last_state), every gradient by name."""
    leaves = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    grown = [k for k, v in leaves.items() if isinstance(v, torch.Tensor) and weights is not None]
    for name in grown:
        leaves[name].requires_grad_()
    y, last_state = function(**leaves, return_last_state=True, **options)
    named = {"y": y, "last_state": last_state}
    if weights is not None:
        cotangents = [w.to(x.device, x.dtype) for w, x in zip(weights, (y, last_state), strict=True)]
        grads = torch.autograd.grad((y, last_state), [leaves[k] for k in grown], cotangents)
        named |= {f"d{k}": g for k, g in zip(grown, grads, strict=True)}
    return named


def weights_of(inputs, rows=None, seed=1):
    """Random cotangents of y and last_state."""
    generator = torch.Generator().manual_seed(seed)
    u, A = inputs["u"], inputs["A"]
    state = torch.randn(rows or len(u), *A.shape, generator=generator).to(A.dtype)
    return torch.randn(u.shape, generator=generator), state


def check_agrees(inputs, backend, dtype=torch.float32, device="cpu", packing=None, function=None):
    """Assert that the backend agrees with the oracle on y, last_state and every gradient.

    The truth is float64: the NumPy oracle for y and last_state, autograd of the torch loop for the
    gradients. The bound is computed from the torch loop at `dtype` (mamba_ref.checks.bounds).
    """
    packing = packing or {}
    given = at_precision(at_precision(inputs, dtype), dtype, device)
    exact = at_precision(given, torch.float64, device)
    there = {k: v.to(device) for k, v in packing.items()}
    rows = len(packing["cu_seqlens"]) - 1 if "cu_seqlens" in packing else None
    weights = weights_of(given, rows)
    truth = outcome(selective_scan, exact, weights, **there)
    oracle = selective_scan_numpy(
        **in_numpy(at_precision(exact, torch.float64)),
        return_last_state=True,
        **{k: v.numpy() for k, v in packing.items()},
    )
    truth["y"], truth["last_state"] = oracle
    plain = outcome(selective_scan, given, weights, **there)
    function = function or selective_scan_fn
    got = outcome(function, given, weights, backend=backend, **there)
    limits = bounds(plain, truth)
    rows = [Row(name, *errors(got[name], truth[name]), limits[name]) for name in truth]
    assert all(row.ok for row in rows), "\n".join(str(row) for row in rows)
    for name, value in plain.items():
        assert got[name].dtype == value.dtype, name
