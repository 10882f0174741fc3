"""The block between its two large projections: conv, x_proj, dt_proj, scan, gate and out_proj as one op."""

import functools
import importlib

import torch
from torch.nn.functional import linear

from mamba_fast.bench.case import Case, Kernel, View, generator_of
from mamba_fast.bench.peers import peers
from mamba_fast.ops.causal_conv1d import causal_conv1d_fn
from mamba_fast.ops.selective_scan import selective_scan_fn

GPU_CASES = {"130m block": (8, 768, 2048)}  # batch, d_model, length
CPU_CASES = {"small block": (2, 64, 256)}
EXPAND, D_STATE, D_CONV = 2, 16, 4


def cases(device, peer, backend=None):
    """The block under bfloat16 autocast with float32 weights; on a CPU all of it in float32.

    The limit leaves the matrix products out: their operands stay in the cache at best.
    """
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    kernels = [
        Kernel("mamba_inner_fn", fused(importlib.import_module("mamba_fast").mamba_inner_fn)),
        *peers("inner", device, peer, fused),
        Kernel("op by op", op_by_op, "other"),
    ]
    found = []
    for name, shape in (GPU_CASES if gpu else CPU_CASES).items():
        found.append(_case(name, shape, dtype, device, kernels, (View(_first_row, ("y", "dxz")),)))
        one = (1, *shape[1:])  # every gradient, on as much as float64 has room for
        found.append(_case(f"{name}, batch 1", one, dtype, device, kernels, (View(),), timed=False))
    return found


def _case(name, shape, dtype, device, kernels, views, **options):
    batch, d_model, seqlen = shape
    tokens, d_inner = batch * seqlen, EXPAND * d_model
    outer, size = d_model * tokens, dtype.itemsize
    return Case(
        name, shape, dtype, functools.partial(inputs, shape, dtype, device), kernels,
        plain=functools.partial(op_by_op, backend="torch"), views=views,
        work={"forward": ((2 * EXPAND + 1) * outer * size, tokens * d_inner * D_STATE),  # xz; out
              "backward": ((4 * EXPAND + 1) * outer * size, tokens * d_inner * D_STATE)},  # xz, dout; dxz
        **options,
    )  # fmt: skip


def inputs(shape, dtype, device, seed):
    """xz and the weights of a new block."""
    batch, d_model, seqlen = shape
    d_inner, dt_rank = EXPAND * d_model, -(-d_model // 16)
    generator = generator_of(seed, device)

    def normal(*size, fan_in=1):
        return torch.randn(*size, generator=generator, device=device) / fan_in**0.5

    steps = torch.exp(torch.rand(d_inner, generator=generator, device=device) * 4.6 - 6.9)  # 1e-3 to 1e-1
    return {
        "xz": normal(batch, 2 * d_inner, seqlen).to(dtype),
        "conv1d_weight": normal(d_inner, 1, D_CONV, fan_in=D_CONV),
        "conv1d_bias": normal(d_inner),
        "x_proj_weight": normal(dt_rank + 2 * D_STATE, d_inner, fan_in=d_inner),
        "delta_proj_weight": normal(d_inner, dt_rank, fan_in=dt_rank),
        "out_proj_weight": normal(d_model, d_inner, fan_in=d_inner),
        "A": -torch.arange(1.0, D_STATE + 1, device=device).repeat(d_inner, 1),
        "D": normal(d_inner),
        "delta_bias": torch.log(torch.expm1(steps)),
    }


def fused(function):
    """A function of the published signature under the autocast of the bench."""

    def run(xz, A, D, delta_bias, **weights):
        with _autocast(xz):
            return function(xz, **weights, out_proj_bias=None, A=A, D=D, delta_bias=delta_bias)

    return run


def op_by_op(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, A, D, delta_bias,
    backend=None,
):  # fmt: skip
    """The same block, every intermediate result in memory and kept for the backward."""
    with _autocast(xz):
        x, z = xz.chunk(2, dim=1)
        x = causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation="silu", backend=backend)
        sizes = (delta_proj_weight.shape[1], A.shape[1], A.shape[1])
        delta, B, C = linear(x.mT, x_proj_weight).split(sizes, dim=-1)  # (B, L, R), (B, L, N), (B, L, N)
        delta = linear(delta, delta_proj_weight).mT
        options = {"z": z, "delta_bias": delta_bias, "delta_softplus": True, "backend": backend}
        y = selective_scan_fn(x, delta, A, B.mT, C.mT, D, **options)
        return linear(y.mT, out_proj_weight)


def _autocast(xz):
    half = xz.dtype == torch.bfloat16
    return torch.autocast(xz.device.type, dtype=torch.bfloat16, enabled=half)


def _first_row(name, tensor):
    """Rows of the batch do not meet; a gradient of the weights is their sum."""
    return tensor[:1] if name in ("xz", "y") else tensor
