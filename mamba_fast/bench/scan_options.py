"""`scan --options`: what packed sequences and sums in one order cost, beside the same call without them."""

import functools

import torch

from mamba_fast.bench.case import Kernel
from mamba_fast.bench.report import leads
from mamba_fast.bench.scan import GPU_CASES as SCAN_CASES
from mamba_fast.bench.scan import ours, scan_case
from mamba_fast.ops.selective_scan import selective_scan_fn

GPU_CASES = {name: SCAN_CASES[name] for name in ("130m_train", "1.4b_train", "2.8b_8k")}
GPU_CASES["few rows"] = (1, 1024, 2048, 16)
CPU_CASES = {"laptop": (2, 512, 2048, 16), "one row": (1, 512, 2048, 16)}
SEQUENCES = 4  # in a row


def cases(device, peer, backend=None):
    """The default kernel alone, then with each option; the tests, not this bench, check what options do."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    plain = ours(device, backend)[0]
    return [
        scan_case(
            name, shape, dtype, device, [plain, *with_options(plain.name, shape, device)], thorough=False
        )
        for name, shape in (GPU_CASES if gpu else CPU_CASES).items()
    ]


def with_options(backend, shape, device):
    """SEQUENCES of one length in each row; cu_seqlens needs a batch of one."""
    batch, _, seqlen, _ = shape
    edges = torch.arange(SEQUENCES + 1, device=device, dtype=torch.int32) * seqlen // SEQUENCES
    seq_idx = torch.bucketize(torch.arange(seqlen, device=device), edges[1:], right=True, out_int32=True)
    options = {"seq_idx": {"seq_idx": seq_idx.expand(batch, seqlen).contiguous()}}
    if batch == 1:
        options["cu_seqlens"] = {"cu_seqlens": edges}
    options["deterministic"] = {"deterministic": True}
    scan = functools.partial(selective_scan_fn, delta_softplus=True, backend=backend)
    return [Kernel(name, functools.partial(scan, **given), "other") for name, given in options.items()]


def findings(rows):
    """Time with an option over the time without: the least and the most of all cases."""
    lead, lines = leads(rows), []
    for name in dict.fromkeys(row["name"] for row in rows if row["role"] == "other"):
        pairs = [(row, lead[row["case"], row["dtype"]]) for row in rows if row["name"] == name]
        for parts in (("forward",), ("backward",), ("forward", "backward")):
            found = sorted((time(row, parts) / time(plain, parts) - 1, row["case"]) for row, plain in pairs)
            (low, least), (high, most) = found[0], found[-1]
            lines.append(f"{name}, {' + '.join(parts)}: {low:+.0%} ({least}) to {high:+.0%} ({most})")
    return lines


def time(row, parts):
    return sum(row[part]["median"] for part in parts)
