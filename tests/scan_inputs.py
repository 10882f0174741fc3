"""Random arguments of the selective scan in every form it accepts, and the bound for two float64 results."""

import numpy as np
import torch

from mamba_ref.checks import bound

FORMS = ("variable", "grouped", "constant")  # of B and of C


def scan_inputs(
    seed=0, batch=2, d_inner=6, seqlen=5, d_state=3, *, B="variable", C="variable", groups=2,
    complex_A=False, D=True, z=True, delta_bias=True, delta_softplus=True, initial_state=True,
):  # fmt: skip
    """Keyword arguments of `selective_scan`, float64 tensors whose values float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, is_complex=False):
        x = torch.randn((*shape, 2), generator=generator, dtype=torch.float32).double()
        return torch.view_as_complex(x) if is_complex else x[..., 0].contiguous()

    def projection(form):
        width = seqlen * (2 if complex_A else 1)  # a complex B or C comes as re, im pairs
        if form == "constant":
            return normal(d_inner, d_state, is_complex=complex_A)
        return normal(batch, d_state, width) if form == "variable" else normal(batch, groups, d_state, width)

    decay = -normal(d_inner, d_state).abs() - 0.25
    delta = normal(batch, d_inner, seqlen)
    return dict(
        u=normal(batch, d_inner, seqlen),
        delta=delta if delta_softplus else delta.abs() / 2,  # a step size is positive
        A=torch.complex(decay, 2 * normal(d_inner, d_state)) if complex_A else decay,
        B=projection(B),
        C=projection(C),
        D=normal(d_inner) if D else None,
        z=normal(batch, d_inner, seqlen) if z else None,
        delta_bias=normal(d_inner).abs() / 2 if delta_bias else None,
        delta_softplus=delta_softplus,
        initial_state=normal(batch, d_inner, d_state, is_complex=complex_A) if initial_state else None,
    )


def in_numpy(inputs):
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def in_float32(inputs):
    """The same values as float32 (complex64) tensors: nothing is rounded."""

    def cast(v):
        return v.to(torch.complex64 if v.is_complex() else torch.float32)

    return {k: cast(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def bound64(plain32, want, roundings):
    """How far two float64 results may differ, from the error that plain PyTorch makes in float32.

    Rounding errors are proportional to the unit roundoff, so that error is scaled by the ratio of the
    two roundoffs. `roundings` is the number of operations on the longest path to one result: a float32
    error that is small by luck must not ask for less than that many roundings.
    """
    u32, u64 = torch.finfo(torch.float32).eps / 2, torch.finfo(torch.float64).eps / 2
    return (bound(plain32, want) / u32 + roundings) * u64


def roundings(seqlen, d_state):
    """A product, a sum, an exponential and its argument a step; N products summed; gate, softplus, skip."""
    return 4 * seqlen + d_state + 8


def changed_at(x, t):
    """A copy of x (..., L) with other values at token t (a NumPy array or a tensor)."""
    x = x.copy() if isinstance(x, np.ndarray) else x.clone()
    x[..., t] = x[..., t] * 1.5 + 1
    return x
