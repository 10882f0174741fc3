"""The summary of a slice by the CUDA kernel that finds what the stretches of a sequence hand on."""

import functools

from mamba_fast.ops.selective_scan import cuda_plan as plan
from mamba_fast.ops.selective_scan.arguments import is_constant
from mamba_fast.ops.selective_scan.cuda_launch import Launch, strides_of
from mamba_fast.ops.selective_scan.cuda_scan import _empty, _named, _statics
from mamba_fast.ops.selective_scan.slices import behind


def summary(x, delta, A, M, gate, delta_bias, reverse):
    """See :func:`slices.summary`."""
    launch, stretches = _launch(tuple(map(plan.look, (x, delta, gate, A, M))), x.dtype, reverse, x.device)
    local, total = _empty(x.device, *stretches), _empty(x.device, *stretches[:3])
    matrix = ("C" if reverse else "B") + ("_constant" if is_constant(M, x) else "")
    launch({
        "dy" if reverse else "u": x, "delta": delta, "z": gate, "A": A, matrix: M,
        "bias": delta_bias.contiguous(), "local": local, "total": total,
    })  # fmt: skip
    return behind(A, local, total, reverse)


@functools.lru_cache(maxsize=1024)
def _launch(looks, io, reverse, device):
    """The kernel's launch, and the shape (B, S, D, N) of what it writes."""
    x, delta, gate, A, M = looks = _named(looks)
    batch, channels, seqlen = x.shape
    cut = plan.cut_forward((batch, channels, seqlen, plan.spans(x, M, M)[2], device)).abreast(channels)
    wide = plan.is_wide(io, x, delta, gate), plan.is_wide(io, M), plan.is_wide(io, M)
    macros = plan.defines(
        cut, io, A.shape[1], M, M, x, gate is not None, packed=False, softplus=True, varlen=False,
        reverse=reverse, wide=wide, big=plan.is_big(*looks),
    )  # fmt: skip
    macros |= {"REVERSE": int(reverse), "UNROLL": 1}
    rows = {"delta": delta, "z": gate, "dy" if reverse else "u": x}
    statics = _statics(cut, x, A, M, M) | strides_of(**rows)
    grid = batch * cut.stretches * cut.blocks
    launch = Launch("scan_summary", cut=cut, macros=macros, statics=statics, grid=grid, device=device)
    return launch, (batch, cut.stretches, channels, A.shape[1])
