"""How a call is cut for the CUDA kernels: a table of sizes, no search."""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch

from mamba_fast.ops.rooms import shared_limit
from mamba_fast.ops.selective_scan.arguments import is_constant
from mamba_fast.ops.selective_scan.cuda_tables import (
    BACKWARD,
    BACKWARD_MANY_STATES,
    BACKWARD_ROOMY,
    FORWARD,
    LAST,
    MANY_STATES,
    ORDERED,
    ROOMY_ROWS,
    SHARED_OF_MANY_WARPS,
    STRETCHED_BACKWARD,
    STRETCHED_FORWARD,
)

CHUNK = 64  # tokens between saved states, as in cuda_tiles.cuh
# Over dB and dC in bfloat16: a number whose digits are cut off behind the eleventh is so much too small.
KEPT = 1.00035
_FOLDER = Path(__file__).parent
_COMMON = ("cuda_machine.cuh", "cuda_tiles.cuh", "cuda_cuts.cuh")
SOURCES = {
    "scan_forward": [_FOLDER / name for name in (*_COMMON, "cuda_forward.cu")],
    "scan_backward": [_FOLDER / name for name in (*_COMMON, "cuda_backward.cu", "cuda_backward_block.cu")],
    "scan_summary": [_FOLDER / name for name in (*_COMMON, "cuda_summary.cu")],
}
SOURCES["scan_chain"] = SOURCES["scan_summary"]
SOURCES["scan_starts"] = [_FOLDER / name for name in (*_COMMON, "cuda_starts.cu")]
_IO = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Cut(NamedTuple):
    """One kernel's share of the work: `lanes` lanes of `steps` tokens a channel in a warp's tile."""

    lanes: int
    steps: int
    warps: int  # of a block
    along: int  # of them hold the same channels, one tile behind the other
    stage: int  # numbers of B (and of C) in shared memory at a time
    min_blocks: int  # blocks a multiprocessor holds at least: bounds the registers
    unroll: int
    stretch: int  # tokens a block walks over
    stretches: int
    span: int  # channels that share their groups of B and C
    blocks: int  # blocks along the channels

    @property
    def tile(self):
        return self.lanes * self.steps * self.along

    @property
    def block_d(self):
        return 32 // self.lanes * self.warps // self.along

    def abreast(self, channels):
        """The same cut with every warp on channels of its own."""
        cut = self._replace(along=1)
        return cut._replace(blocks=channels // cut.span * -(-cut.span // cut.block_d))


@functools.cache
def capability(device):
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def spans(u, B, C):
    """Channels that share a group of B, of C and of both."""
    channels = u.shape[1]
    one = [channels if is_constant(v, u) else channels // v.shape[1] for v in (B, C)]
    return (*one, math.gcd(*one))


def cut_forward(size, roomy=False):
    """size: batch, channels, seqlen, span, device. roomy: threads take more registers than usual."""
    return _cut(*next(_kinds(FORWARD, size, roomy)), STRETCHED_FORWARD, *size)


def unrolled(cut, io, d_state, packed, varlen, device):
    """How often the forward's loop over n is unrolled.

    As often as the table says there are registers enough on any chip, and with packed rows (by cu_seqlens for
    16 lanes or more); twice or four times as often where that is faster, and fits too: from compute
    capability 10 on the compiler needs more.
    """
    if packed:
        return 1 if varlen and cut.lanes == 8 else cut.unroll
    if capability(device) >= (10, 0) or cut.steps < 16 or cut.lanes > 16:
        return cut.unroll
    if cut.along == 1 and (d_state >= 24 or (io == torch.float32 and cut.lanes == 16)):
        return 4
    return 2 if cut.along == 8 and cut.lanes == 8 else cut.unroll


def with_registers(cut, blocks, device):
    """The cut with at most so many blocks a multiprocessor, so that the starts of packed rows find registers.

    The compiler needs the most of them beside compute capability 9: there eight warps.
    """
    if capability(device)[0] != 9:
        blocks = min(blocks, max(1, 8 // cut.warps))
    return cut._replace(min_blocks=min(cut.min_blocks, blocks))


def cut_backward(size, needs, roomy=False):
    """needs: see :func:`needs_of`."""
    float32 = needs["IO"] == _IO[torch.float32]
    many_registers = float32 or (roomy and size[0] * size[1] >= ROOMY_ROWS)
    kinds = _kinds(BACKWARD_ROOMY if many_registers else BACKWARD, size, roomy)
    if needs["N"] >= MANY_STATES and not float32 and not roomy:
        kinds = (*_kinds(BACKWARD_MANY_STATES, size), *kinds)
    return _that_fits((*kinds, *LAST), size, needs)


def cut_ordered(size, needs, roomy=False):
    return _that_fits((*_kinds(ORDERED, size, roomy), *LAST), size, needs)


def _kinds(table, size, roomy=False):
    """The rows of a table that a size may take, the best one first."""
    batch, channels, seqlen, _, device = size
    few_warps = roomy or shared_limit(device) < SHARED_OF_MANY_WARPS
    for (rows, tokens), kind in table.items():
        if batch * channels >= rows and seqlen >= tokens and not (few_warps and kind[2] > 4):
            yield kind


def _that_fits(kinds, size, needs):
    limit = shared_limit(size[-1])
    if limit < SHARED_OF_MANY_WARPS:  # there less of B and C at a time makes room for a second block
        kinds = ((*kind[:4], min(kind[4], 1024), *kind[5:]) for kind in kinds)
    cuts = (_cut(*kind, STRETCHED_BACKWARD, *size) for kind in kinds)
    return next(cut for cut in cuts if shared_bytes("scan_backward", cut._replace(stage=1), needs) <= limit)


@functools.lru_cache(maxsize=4096)
def _cut(
    lanes, steps, warps, along, stage, min_blocks, unroll, stretched, batch, channels, seqlen, span, device
):
    """`stretched`: warps a multiprocessor that are enough without stretches, and what those make of fewer.

    Where warps stand one behind the other, as many as there is room for at a time: what they share out is a
    short sequence.
    """
    block_d, tile = 32 // lanes * warps // along, max(lanes * steps * along, CHUNK)
    blocks = channels // span * -(-span // block_d)
    all_warps, processors = batch * blocks * warps, multiprocessors(device)
    enough, made = stretched
    if along > 1:
        made = min(made, warps * min_blocks)
    wanted = -(-made * processors // all_warps) if all_warps < enough * processors else 1
    stretches = min(wanted, -(-seqlen // tile))
    if stretches < 3:  # finding what enters a stretch costs about half of scanning it
        stretches = 1
    stretch = -(-seqlen // (stretches * tile)) * tile
    return Cut(
        lanes, steps, warps, along, stage, min_blocks, unroll, stretch, -(-seqlen // stretch), span, blocks
    )  # fmt: skip


def fit(entry, cut, macros, device):
    """The cut and its macros with less of B and C in shared memory at a time, where a block would not fit."""
    while shared_bytes(entry, cut, macros) > shared_limit(device) and cut.stage > cut.tile:
        cut = cut._replace(stage=cut.stage // 2)
        macros = macros | {"STAGE": cut.stage}
    return cut, macros


def passes(d_state):
    """Groups of channels a block takes in turn in ordered mode, where it has a slot for dB and dC.

    One below 64 states; then as many as keep the slots, N / 4 bytes per (b, d, t) with eight warps, near 8.
    """
    return max(1, min(8, d_state // 32))


def shared_bytes(entry, cut, defines):
    """Bytes of shared memory of a block; the layouts stand in the .cu files."""
    n, size, buffers = defines["N"], 4 if defines["IO"] == 0 else 2, defines["BUFFERS"]
    threads, channels, wide = 32 * cut.warps, 32 // cut.lanes, 16 // size
    staged = min(max(cut.stage // cut.tile, 1), n)
    matrix, block = staged * cut.tile * 4, 128
    row_parts = cut.tile // wide
    rows_a_pass = max(1, threads // row_parts)
    row_passes = -(-staged // rows_a_pass) * (rows_a_pass * row_parts // threads)
    parts_a_lane = cut.steps // wide
    near = 8 // min(channels, 8) * parts_a_lane
    pitch = cut.lanes * parts_a_lane + (0 if channels == 1 else near if near < 8 else 1)
    raw, slots = row_passes * threads * 16, channels * pitch * cut.warps * 16
    row = n + (channels > 1)
    effects = 2 * cut.warps * channels * 8 if cut.along > 1 else 0
    if entry == "scan_forward":
        return block + 2 * buffers * matrix + 2 * raw + 3 * slots + cut.block_d * row * 8 + effects
    if entry == "scan_summary":
        return block + matrix + raw + cut.block_d * row * 8
    parts = 64 * 16 + (2 * (2 if cut.warps > 4 else cut.warps) * threads * 16 if defines["ORDERED"] else 0)
    shares = cut.lanes if n <= 64 else 1
    seats = channels * cut.warps
    constants = 8 * seats * n if defines["B_CONSTANT"] or defines["C_CONSTANT"] else 0
    inputs = 2 * (3 + defines["HAS_Z"]) * slots
    sums = seats * (16 * row + 4 * n * (1 + shares) + 16) + constants + effects
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
        "IO": _IO[io], "N": N, "LANES": cut.lanes, "STEPS": cut.steps, "WARPS": cut.warps,
        "ALONG": cut.along, "STAGE": cut.stage, "MIN_BLOCKS": cut.min_blocks, "UNROLL": cut.unroll,
        "WIDE_ROWS": int(wide[0]), "WIDE_B": int(wide[1]), "WIDE_C": int(wide[2]),
        "HAS_Z": int(has_z), "SOFTPLUS": int(softplus), "B_CONSTANT": int(is_constant(B, u)),
        "C_CONSTANT": int(is_constant(C, u)), "PACKED": int(packed), "VARLEN": int(varlen),
        "KEEP": int(keep), "REVERSE": int(reverse), "ORDERED": ordered, "BUFFERS": buffers,
        "BIG_STRIDES": int(big),
    }  # fmt: skip


def needs_of(io, N, B, C, u, has_z, ordered):
    """Those that a backward's shared memory depends on."""
    return {
        "IO": _IO[io], "N": N, "HAS_Z": int(has_z), "B_CONSTANT": int(is_constant(B, u)),
        "C_CONSTANT": int(is_constant(C, u)), "ORDERED": int(ordered), "BUFFERS": 1,
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


def for_starts(macros):
    """`macros` for scan_starts, which is one kernel whatever the cut of the others is."""
    fixed = {"N": 1, "LANES": 8, "STEPS": 8, "WARPS": 4, "ALONG": 1, "STAGE": 64, "UNROLL": 1, "BUFFERS": 1}
    return macros | fixed | {"MIN_BLOCKS": 1, "KEEP": 0, "ORDERED": 0, "REVERSE": 0}
