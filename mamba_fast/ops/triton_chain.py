"""Kernels that follow closely on each other: when one may begin, and how it takes up what the last one left.

Launched with launch_pdl=True (compute capability 9.0 and later) a kernel begins while the one before it
still runs. What does not depend on that one comes before `meet`.
"""

import functools

import torch
import triton
import triton.language as tl

from mamba_fast.ops.selective_scan.backends import interpreted


@functools.cache
def early(device):
    """Options of a launch on `device`: where it can, a kernel begins while the one before it ends."""
    can = device.type == "cuda" and torch.version.hip is None and not interpreted()
    can = can and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if can else {"PDL": False}


@triton.jit
def meet(PDL: tl.constexpr):
    """Wait until the kernel before this one has written everything; then the next one may begin."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def ask_for(ptrs, BYTES: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr):
    """Have BYTES behind each of ptrs brought into the second-level cache, all threads a piece.

    BYTES is a multiple of 16 for every piece, or 0.
    """
    if PDL and BYTES > 0:
        PIECES: tl.constexpr = 32 * WARPS // ptrs.shape[0]
        PIECE: tl.constexpr = BYTES // PIECES
        at = ptrs.to(tl.int64)[:, None] + tl.arange(0, PIECES)[None, :] * PIECE
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
            [at, tl.full(at.shape, PIECE, tl.int32)], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def add_parts(ptrs, mask, stride, PARTS: tl.constexpr):
    """The sum of PARTS arrays that lie `stride` apart, always in the same order."""
    total = tl.load(ptrs, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(ptrs + part * stride, mask=mask, other=0.0)
    return total
