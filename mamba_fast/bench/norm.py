"""Residual sum and norm between two blocks: bfloat16 tokens, a float32 residual stream that goes on."""

import functools

import torch

from mamba_fast.bench.case import Case, generator_of
from mamba_fast.bench.conv import kernels
from mamba_fast.bench.peers import peers
from mamba_fast.ops.rms_norm import layer_norm_fn, rms_norm_fn

TOKENS = 16384  # batch 8, length 2048
GPU_CASES = {
    "130m RMS": (TOKENS, 768),
    "1.4b RMS": (TOKENS, 2048),
    "2.8b RMS": (TOKENS, 2560),
    "wide RMS": (TOKENS, 5120),
    "2.8b LayerNorm": (TOKENS, 2560),
}
CPU_CASES = {"laptop RMS": (512, 768), "laptop LayerNorm": (512, 768)}
OPTIONS = {"prenorm": True, "residual_in_fp32": True, "eps": 1e-5}


def cases(device, peer, backend=None):
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    return [
        _case(name, shape, dtype, device, peer, backend)
        for name, shape in (GPU_CASES if gpu else CPU_CASES).items()
    ]


def _case(name, shape, dtype, device, peer, backend):
    def with_options(function):
        def run(x, residual, weight, bias=None, **options):
            return function(x, weight, bias, residual=residual, **OPTIONS, **options)

        return run

    rms = name.endswith("RMS")
    run = with_options(rms_norm_fn if rms else layer_norm_fn)
    published = peers("rms_norm" if rms else "layer_norm", device, peer, with_options)
    numbers, size = torch.Size(shape).numel(), dtype.itemsize
    return Case(
        name, shape, dtype, functools.partial(inputs, shape, not rms, dtype, device),
        [*kernels(run, device, backend), *published],
        plain=functools.partial(run, backend="torch"), outputs=("y", "residual"),
        work={"forward": (numbers * 2 * (size + 4), 0),  # x, residual; y, their sum
              "backward": (numbers * (2 * (size + 4) + 4), 0)},  # dy, dsum, sum; dx, dresidual
    )  # fmt: skip


def inputs(shape, bias, dtype, device, seed):
    generator = generator_of(seed, device)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    tensors = {"x": normal(*shape).to(dtype), "residual": normal(*shape), "weight": normal(shape[1])}
    return tensors | ({"bias": normal(shape[1])} if bias else {})
