"""The scan beside causal attention of the same width, forward: one grows with L, the other with L squared."""

import functools
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mamba_fast.bench.case import Case, Kernel, View, generator_of
from mamba_fast.bench.scan import ours, published, scan_case

HEADS, WIDTH = 16, 64  # together d_inner 1024
GPU_LENGTHS = [2**k for k in range(9, 18)]
CPU_LENGTHS = [128, 256, 512, 1024]
KINDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
QUERIES = 64  # the last ones, for which the truth is computed


def cases(device, peer, backend=None):
    """For every length the scan (N = 16, with D, z, delta_bias, softplus), then attention."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    scans, found = [*ours(device, backend), *published(device, peer)], []
    attentions = [Kernel(n, functools.partial(sdpa, k), "peer") for n, k in KINDS.items() if _runs(k, device)]
    for seqlen in GPU_LENGTHS if device.type == "cuda" else CPU_LENGTHS:
        name, shape = f"L={seqlen}", (1, HEADS, seqlen, WIDTH)
        options = {"backward": False}
        found.append(scan_case(name, (1, HEADS * WIDTH, seqlen, 16), dtype, device, scans, **options))
        if attentions:
            make, views = functools.partial(inputs, shape, dtype, device), (View(_last_queries),)
            found.append(Case(name, shape, dtype, make, attentions, attention, views=views, **options))
    return found


def inputs(shape, dtype, device, seed):
    generator = generator_of(seed, device)
    return {n: torch.randn(*shape, generator=generator, device=device, dtype=dtype) for n in ("q", "k", "v")}


def sdpa(kind, q, k, v):
    with sdpa_kernel(kind):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def attention(q, k, v):
    """softmax(q k^T / sqrt(width)) v, where the last query sees every key, the one before all but one ..."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(
        k.shape[2] - q.shape[2] + 1
    )
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def _last_queries(name, tensor):
    return tensor[:, :, -QUERIES:] if name in ("q", "y") else tensor


def _runs(kind, device):
    """Whether this build of PyTorch has the kind for this device."""
    q = torch.zeros(1, 1, 64, 64, device=device, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says at length why not
        try:
            sdpa(kind, q, q, q)
        except RuntimeError:
            return False
    return True


def findings(rows):
    """From which length on the scan is ahead of the best attention."""
    lengths = {}
    for row in rows:
        side = "scan" if row["role"] == "ours" else "attention" if row["name"] in KINDS else None
        times = lengths.setdefault(row["case"], {"scan": [], "attention": []})
        if side:
            times[side].append(row["forward"]["median"])
    ratios = {c: min(t["attention"]) / min(t["scan"]) for c, t in lengths.items() if t["attention"]}
    lines = [f"attention over scan: {', '.join(f'{c} {ratio:.2f}x' for c, ratio in ratios.items())}"]
    behind = [c for c, ratio in ratios.items() if ratio <= 1]
    return [*lines, f"the scan is behind at: {', '.join(behind) or 'no length'}"]
