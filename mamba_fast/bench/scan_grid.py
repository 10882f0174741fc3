"""`scan --grid`: is any shape slower than the published kernel, and does a token cost the same everywhere?"""

import itertools

import torch

from mamba_fast.bench.report import DIRECTIONS, against_peer, leads
from mamba_fast.bench.scan import ours, published, scan_case

GPU_GRID = ((1, 2, 8, 32), (128, 384, 1536, 3072), (128, 1000, 4096, 16384))  # batch, d_inner, length
CPU_GRID = ((1, 2), (32, 100), (65, 256))
GPU_LENGTHS, LENGTH_SHAPE = [2**k for k in range(11, 21)], (1, 1536)
CPU_LENGTHS = [512, 1024, 2048]
MOST_BYTES = 40e9
TENSORS = 12  # of (batch, d_inner, length) that the check and the backward hold at a time
BY_LENGTH = "length "  # how the names of the cases along the length begin


def cases(device, peer, backend=None):
    """The default kernel of ours against the published one, on every shape that fits."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    kernels = [*ours(device, backend)[:1], *published(device, peer)]
    shapes = {" x ".join(map(str, s)): s for s in itertools.product(*(GPU_GRID if gpu else CPU_GRID))}
    lengths = GPU_LENGTHS if gpu else CPU_LENGTHS
    shapes |= {f"{BY_LENGTH}{seqlen}": (*LENGTH_SHAPE, seqlen) for seqlen in lengths}
    return [
        scan_case(name, (*shape, 16), dtype, device, kernels, thorough=False)
        for name, shape in shapes.items()
        if TENSORS * dtype.itemsize * torch.Size(shape).numel() <= MOST_BYTES
    ]


def nanoseconds(row, direction):
    """Time of one element of (batch, d_inner, length)."""
    return 1e6 * row[direction]["median"] / torch.Size(row["shape"][:3]).numel()


def along_length(rows, name):
    return [row for row in rows if row["name"] == name and row["case"].startswith(BY_LENGTH)]


def findings(rows):
    """The worst and best ratios, and how far a kernel's time per element moves with the length."""
    lines = against_peer(rows)
    for name in dict.fromkeys(row["name"] for row in rows):
        for d in DIRECTIONS:
            times = [nanoseconds(row, d) for row in along_length(rows, name)]
            lines.append(f"{name} {d}: {max(times) / min(times) - 1:.0%} between lengths, time per element")
    return lines


def ratios(rows, direction):
    """(elements, published time over ours) of every shape of the grid."""
    lead = leads(rows)
    return [
        (torch.Size(row["shape"][:3]).numel(), row[direction]["median"] / mine[direction]["median"])
        for row in rows
        if row["role"] == "peer" and not row["case"].startswith(BY_LENGTH)
        for mine in [lead[row["case"], row["dtype"]]]
    ]
