"""How a call is cut for the CUDA kernels: a table of sizes, no search."""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch

from mamba_fast.ops.selective_scan.arguments import is_constant

CHUNK = 64  # tokens between saved states, as in cuda_tiles.cuh
WARPS = 4
# Over dB and dC in bfloat16: a number whose digits are cut off behind the eleventh is so much too small.
KEPT = 1.00035
_FOLDER = Path(__file__).parent
_SHARED = ("cuda_machine.cuh", "cuda_tiles.cuh")
SOURCES = {
    "scan_forward": [_FOLDER / name for name in (*_SHARED, "cuda_forward.cu")],
    "scan_backward": [_FOLDER / name for name in (*_SHARED, "cuda_backward.cu", "cuda_backward_block.cu")],
    "scan_summary": [_FOLDER / name for name in (*_SHARED, "cuda_summary.cu")],
}
SOURCES["scan_chain"] = SOURCES["scan_summary"]
_IO = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Warps a multiprocessor: with fewer in a call than the first number its sequences are cut into stretches, so
# that there are as many as the second. At seven, the forward loses more by finding what enters a stretch than
# it gains.
_STRETCHED_FORWARD, _STRETCHED_BACKWARD = (6, 16), (8, 48)


class Cut(NamedTuple):
    """One kernel's share of the work: `lanes` lanes of `steps` tokens a channel in a warp's tile."""

    lanes: int
    steps: int
    stage: int  # numbers of B (and of C) in shared memory at a time
    min_blocks: int  # blocks a multiprocessor holds at least: bounds the registers
    unroll: int
    stretch: int  # tokens a block walks over
    stretches: int
    span: int  # channels that share their groups of B and C
    blocks: int  # blocks along the channels

    @property
    def tile(self):
        return self.lanes * self.steps

    @property
    def block_d(self):
        return 32 // self.lanes * WARPS


@functools.cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def spans(u, B, C):
    """Channels that share a group of B, of C and of both."""
    channels = u.shape[1]
    one = [channels if is_constant(v, u) else channels // v.shape[1] for v in (B, C)]
    return (*one, math.gcd(*one))


# lanes, steps, stage, min_blocks, unroll. Forward, for at least so many rows of B * D. Many rows: few lanes
# each, so that B and C serve several channels and the scan is short. Few rows: many lanes, so that warps are
# enough. The backward sums over the four channels of a warp by one product, so its lanes and steps are fixed.
FORWARD = {
    8192: (8, 16, 2048, 3, 2),
    3072: (16, 16, 2048, 3, 2),
    1024: (32, 8, 2048, 4, 2),
    0: (32, 16, 4096, 3, 2),
}
SHORT = (16, 8, 1024, 4, 1)  # up to 128 tokens: no wider tile
BACKWARD = (8, 8, 1024, 4, 1)


def cut_forward(batch, channels, seqlen, span, device):
    rows = batch * channels
    kind = SHORT if seqlen <= 128 else next(kind for least, kind in FORWARD.items() if rows >= least)
    return _cut(*kind, _STRETCHED_FORWARD, batch, channels, seqlen, span, device)


def cut_backward(batch, channels, seqlen, span, device):
    return _cut(*BACKWARD, _STRETCHED_BACKWARD, batch, channels, seqlen, span, device)


@functools.lru_cache(maxsize=4096)
def _cut(lanes, steps, stage, min_blocks, unroll, stretched, batch, channels, seqlen, span, device):
    """`stretched`: warps a multiprocessor that are enough without stretches, and what those make of fewer."""
    block_d, tile = 32 // lanes * WARPS, max(lanes * steps, CHUNK)
    blocks = channels // span * -(-span // block_d)
    warps, processors = batch * blocks * WARPS, multiprocessors(device)
    enough, made = stretched
    wanted = -(-made * processors // warps) if warps < enough * processors else 1
    stretches = min(wanted, -(-seqlen // tile))
    if stretches < 3:  # finding what enters a stretch costs about half of scanning it
        stretches = 1
    stretch = -(-seqlen // (stretches * tile)) * tile
    return Cut(
        lanes, steps, stage, min_blocks, unroll, stretch, -(-seqlen // stretch), span, blocks
    )  # fmt: skip


@functools.cache
def shared_limit(device):
    """Bytes of shared memory that a block may have."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def fit(entry, cut, macros, device):
    """The cut and its macros with less of B and C in shared memory at a time, where a block would not fit."""
    while shared_bytes(entry, cut, macros) > shared_limit(device) and cut.stage > cut.tile:
        cut = cut._replace(stage=cut.stage // 2)
        macros = macros | {"STAGE": cut.stage}
    return cut, macros


def passes(cut, batch, device):
    """Groups of channels a block takes in turn in ordered mode, where it has a slot for dB and dC.

    As many as leave one block for every place on the chip.
    """
    return max(
        1, min(8, round(batch * cut.blocks * cut.stretches / (cut.min_blocks * multiprocessors(device))))
    )


def shared_bytes(entry, cut, defines):
    """Bytes of shared memory of a block; the layouts stand in the kernels' `lay_out`."""
    n, size, buffers = defines["N"], 4 if defines["IO"] == 0 else 2, defines["BUFFERS"]
    threads, channels, wide = 32 * WARPS, 32 // cut.lanes, 16 // size
    staged = min(max(cut.stage // cut.tile, 1), n)
    matrix, block = staged * cut.tile * 4, 128
    passes = -(-staged // (threads // (cut.tile // wide)))
    parts_a_lane = cut.steps // wide
    near = 8 // min(channels, 8) * parts_a_lane
    pitch = cut.lanes * parts_a_lane + (0 if channels == 1 else near if near < 8 else 1)
    raw, slots = passes * threads * 16, channels * pitch * WARPS * 16
    row = n + (channels > 1)
    if entry == "scan_forward":
        return block + 2 * buffers * matrix + 2 * raw + 3 * slots + cut.block_d * row * 8
    if entry == "scan_summary":
        return block + matrix + raw + cut.block_d * row * 8
    parts = 64 * 16 + (2 * 4 * threads * 16 if defines["ORDERED"] else 0)
    shares = cut.lanes if n <= 64 else 1
    constants = 8 * cut.block_d * n if defines["B_CONSTANT"] or defines["C_CONSTANT"] else 0
    inputs = 2 * (3 + defines["HAS_Z"]) * slots
    sums = cut.block_d * (16 * row + 4 * n * (1 + shares) + 16) + constants
    return block + 2 * buffers * matrix + 2 * raw + inputs + parts + sums


class Look(NamedTuple):
    """What a kernel's source and its strides depend on: everything of a tensor but where it lies."""

    shape: torch.Size
    strides: tuple
    aligned: bool  # at 16 bytes


def look(t):
    """The numbers of a :class:`Look`, as a plain tuple: a key that costs little to make."""
    return None if t is None else (t.shape, t.stride(), t.data_ptr() % 16 == 0)


def defines(
    cut,
    io,
    N,
    B,
    C,
    u,
    has_z,
    packed,
    softplus,
    varlen,
    keep=False,
    reverse=False,
    ordered=0,
    buffers=2,
    wide=(),
    big=False,
):
    """The macros that make a kernel of its source. wide: may rows, B, C be read 16 bytes at a time?"""
    return {
        "IO": _IO[io], "N": N, "LANES": cut.lanes, "STEPS": cut.steps, "WARPS": WARPS,
        "STAGE": cut.stage, "MIN_BLOCKS": cut.min_blocks, "UNROLL": cut.unroll,
        "WIDE_ROWS": int(wide[0]), "WIDE_B": int(wide[1]), "WIDE_C": int(wide[2]),
        "HAS_Z": int(has_z), "SOFTPLUS": int(softplus), "B_CONSTANT": int(is_constant(B, u)),
        "C_CONSTANT": int(is_constant(C, u)), "PACKED": int(packed), "VARLEN": int(varlen),
        "KEEP": int(keep), "REVERSE": int(reverse), "ORDERED": ordered, "BUFFERS": buffers,
        "BIG_STRIDES": int(big),
    }  # fmt: skip


def is_wide(io, *looks):
    """Whether (..., L) tensors of type io can be read in aligned pieces of 16 bytes along the last axis."""
    pieces = 16 // io.itemsize
    return all(
        v is None or (v.aligned and v.strides[-1] == 1 and not any(s % pieces for s in v.strides[:-1]))
        for v in looks
    )


def is_big(*looks):
    """Whether a stride (but that of the batch) or an offset along the tokens needs more than 31 bits."""
    return any(v is not None and any(abs(s) >= 2**31 for s in v.strides[1:]) for v in looks)
