"""Random arguments of mamba_inner_fn, the block from the reference's own pieces, and their comparison."""

import torch
import torch.nn.functional as F

from mamba_fast import mamba_inner_fn
from mamba_ref.causal_conv import causal_conv
from mamba_ref.checks import Row, bounds, errors
from mamba_ref.selective_scan import selective_scan

NORMS = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")


def inner_inputs(
    seed=0, batch=2, d_inner=6, seqlen=9, d_state=3, rank=2, width=4, d_model=5, *, B=None, C=None,
    complex_A=False, absent=(),
):  # fmt: skip
    """Arguments by name, float64 tensors whose values float32 holds exactly.

    B, C: None, "constant", "variable" or "grouped"; `absent` are left None.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).double()

    rows = d_state * (2 if complex_A else 1)

    def matrix(form):
        length = seqlen * (2 if complex_A else 1)
        shapes = {"constant": (d_inner, d_state), "variable": (batch, d_state, length),
                  "grouped": (batch, 2, d_state, length)}  # fmt: skip
        v = None if form is None else normal(*shapes[form])
        return torch.complex(v, normal(*v.shape)) if complex_A and form == "constant" else v

    decay = -normal(d_inner, d_state).abs() - 0.25
    named = dict(
        xz=normal(batch, 2 * d_inner, seqlen),
        conv1d_weight=normal(d_inner, 1, width, scale=0.5),
        conv1d_bias=normal(d_inner),
        x_proj_weight=normal(rank + ((B is None) + (C is None)) * rows, d_inner, scale=d_inner**-0.5),
        delta_proj_weight=normal(d_inner, rank, scale=rank**-0.5),
        out_proj_weight=normal(d_model, d_inner, scale=d_inner**-0.5),
        out_proj_bias=normal(d_model),
        A=torch.complex(decay, normal(d_inner, d_state)) if complex_A else decay,
        B=matrix(B),
        C=matrix(C),
        D=normal(d_inner),
        delta_bias=normal(d_inner).abs() / 2,
        B_proj_bias=normal(rows) if B is None else None,
        C_proj_bias=normal(rows) if C is None else None,
        b_rms_weight=normal(d_state) if B is None and not complex_A else None,
        c_rms_weight=normal(d_state) if C is None and not complex_A else None,
        dt_rms_weight=normal(d_inner),
    )
    return {k: None if k in absent else v for k, v in named.items()}


def reference(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C,
    D, delta_bias, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight, delta_softplus=True,
    eps=1e-6,
):  # fmt: skip
    """The block by pieces of the reference, token by token in the scan; projections in xz's type."""
    project = [
        w if w is None else w.to(xz.dtype) for w in (x_proj_weight, delta_proj_weight, out_proj_weight)
    ]
    x, z = xz[:, : xz.shape[1] // 2], xz[:, xz.shape[1] // 2 :]
    u = causal_conv(x, conv1d_weight[:, 0], conv1d_bias, "silu")
    rows = F.linear(u.transpose(1, 2), project[0])  # (B, L, R + ...)
    rank = delta_proj_weight.shape[1]
    delta = F.linear(rows[..., :rank], project[1])
    delta = _norm(delta, dt_rms_weight, eps).transpose(1, 2)
    size = A.shape[1] * (2 if A.is_complex() else 1)

    def matrix(given, first, bias, rms):
        if given is not None:
            return given
        v = rows[..., first : first + size]
        v = _norm(v if bias is None else v + bias.to(v.dtype), rms, eps).transpose(1, 2)
        return v.reshape(len(v), -1, 2, v.shape[2]).transpose(2, 3).flatten(2) if A.is_complex() else v

    C = matrix(C, rank + (size if B is None else 0), C_proj_bias, c_rms_weight)
    B = matrix(B, rank, B_proj_bias, b_rms_weight)
    y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    bias = None if out_proj_bias is None else out_proj_bias.to(xz.dtype)
    return F.linear(y.transpose(1, 2), project[2], bias)


def _norm(v, weight, eps):
    if weight is None:
        return v
    x = v.to(torch.promote_types(v.dtype, torch.float32))
    return (x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(v.dtype)


def at_precision(inputs, dtype, device="cpu"):
    """xz and a B or C in time in `dtype`, the rest in float32, or in float64 beside float64 tokens."""
    wide = torch.promote_types(dtype, torch.float32)

    def cast(name, v):
        to = dtype if name == "xz" or (name in ("B", "C") and v.dim() > 2) else wide
        return v.to(device, to.to_complex() if v.is_complex() else to)

    return {k: None if v is None else cast(k, v) for k, v in inputs.items()}


def outcome(function, inputs, cotangent, **options):
    """out and every gradient by name."""
    leaves = {k: None if v is None else v.detach().clone().requires_grad_() for k, v in inputs.items()}
    out = function(**leaves, **options)
    grown = [k for k, v in leaves.items() if v is not None]
    grads = torch.autograd.grad(out, [leaves[k] for k in grown], cotangent.to(out.device, out.dtype))
    return {"out": out.detach()} | {f"d{k}": g for k, g in zip(grown, grads, strict=True)}


def check_agrees(inputs, backend, device, dtype=torch.float32, **options):
    """Assert that out and every gradient are those of the reference in float64; return them."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(inputs["xz"]), inputs["xz"].shape[2], len(inputs["out_proj_weight"]))
    cotangent = torch.randn(shape, generator=generator)
    given = at_precision(inputs, dtype, device)
    exact = {k: None if v is None else v.cpu().to(torch.complex128 if v.is_complex() else torch.float64)
             for k, v in given.items()}  # fmt: skip
    softplus = {k: v for k, v in options.items() if k == "delta_softplus"}
    want = outcome(reference, exact, cotangent.to(dtype), **softplus)
    plain = outcome(reference, at_precision(inputs, dtype), cotangent, **softplus)
    got = outcome(mamba_inner_fn, given, cotangent, backend=backend, **options)
    limits = bounds(plain, want)
    rows = [Row(k, *errors(got[k].cpu(), want[k]), limits[k]) for k in want]
    assert all(row.ok for row in rows), "\n".join(str(row) for row in rows)
    for name, value in got.items():
        assert value.dtype == (given["xz"].dtype if name == "out" else given[name[1:]].dtype), name
    return got
