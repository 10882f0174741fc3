"""The summary of a slice in Triton: that of its tiles, chained."""

from mamba_fast.ops.selective_scan.arguments import is_constant
from mamba_fast.ops.selective_scan.slices import behind
from mamba_fast.ops.selective_scan.triton_forward import tile_summary_kernel
from mamba_fast.ops.selective_scan.triton_scan import _WARPS, _plan, _strides


def summary(x, delta, A, M, gate, delta_bias, reverse):
    """See :func:`slices.summary`."""
    (batch, channels, seqlen), N = x.shape, A.shape[1]
    plan = _plan(x, M, M)._replace(tiles_per_program=1)
    local = A.new_empty(batch, plan.tiles, channels, N)
    total = A.new_empty(local.shape[:3])
    tile_summary_kernel[plan.grid](
        delta, delta_bias.contiguous(), A, x, gate, M, None, None, local, total,
        delta.stride(), A.stride(), x.stride(), _strides(gate), M.stride(), channels, seqlen, plan.tiles,
        channels // M.shape[1], N=N, HAS_BIAS=True, HAS_GATE=gate is not None, HAS_TABLE=False, SOFTPLUS=True,
        PACKED=False, VARLEN=False, M_CONSTANT=is_constant(M, x), REVERSE=reverse, BLOCK_D=plan.block_d,
        BLOCK_L=plan.block_l, num_warps=_WARPS,
    )  # fmt: skip
    return behind(A, local, total, reverse)
