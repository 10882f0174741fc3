"""The causal convolution, width 4 with SiLU, in both layouts, and its step form."""

import functools

import torch

from mamba_fast.bench.case import Case, Kernel, generator_of
from mamba_fast.bench.peers import peers
from mamba_fast.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_fast.ops.rooms import NAMES

WIDTH = 4
GPU_CASES = {
    "130m_train": (8, 1536, 2048),
    "1.4b_train": (4, 4096, 2048),
    "2.8b_8k": (1, 5120, 8192),
    "130m_64k": (1, 1536, 65536),
}
CPU_CASES = {"laptop": (2, 256, 1024)}
GPU_UPDATES = [(1, 5120), (64, 5120), (256, 5120)]
CPU_UPDATES = [(2, 256)]


def cases(device, peer, backend=None):
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    found = []
    for name, shape in (GPU_CASES if gpu else CPU_CASES).items():
        for layout in ("rows", "columns"):
            found.append(_conv_case(f"{name} {layout}", shape, layout, dtype, device, peer, backend))
    for shape in GPU_UPDATES if gpu else CPU_UPDATES:
        found.append(_update_case(shape, dtype, device, peer, backend))
    return found


def kernels(function, device, backend):
    """Our fused rooms on this device; plain PyTorch on a CPU."""
    rooms = [n for n in reversed(NAMES) if n != "torch"] if device.type == "cuda" else ["torch"]
    return [Kernel(n, functools.partial(function, backend=n)) for n in ([backend] if backend else rooms)]


def _conv_case(name, shape, layout, dtype, device, peer, backend):
    run = functools.partial(causal_conv1d_fn, activation="silu")
    published = peers("conv", device, peer, lambda function: functools.partial(function, activation="silu"))
    size = torch.Size(shape).numel() * dtype.itemsize
    return Case(
        name, shape, dtype, functools.partial(inputs, shape, layout, dtype, device),
        [*kernels(run, device, backend), *published],
        plain=functools.partial(run, backend="torch"),
        work={"forward": (2 * size, 0), "backward": (3 * size, 0)},  # x, y; x, dy, dx
    )  # fmt: skip


def inputs(shape, layout, dtype, device, seed):
    """x with its time steps ("rows") or its channels ("columns") side by side; weights in float32."""
    batch, channels, seqlen = shape
    normal = functools.partial(torch.randn, generator=generator_of(seed, device), device=device)
    x = normal(batch, channels, seqlen) if layout == "rows" else normal(batch, seqlen, channels).mT
    return {"x": x.to(dtype), "weight": normal(channels, WIDTH), "bias": normal(channels)}


def _update_case(shape, dtype, device, peer, backend):
    def with_state(function):
        def run(x, conv_state, weight, bias, **options):
            y = function(x, conv_state, weight, bias, activation="silu", **options)
            return y, conv_state

        return run

    run = with_state(causal_conv1d_update)
    size = torch.Size(shape).numel() * dtype.itemsize
    return Case(
        f"step, batch {shape[0]}", shape, dtype, functools.partial(update_inputs, shape, dtype, device),
        [*kernels(run, device, backend), *peers("conv_update", device, peer, with_state)],
        plain=functools.partial(run, backend="torch"), outputs=("y", "conv_state"),
        work={"forward": ((2 + 2 * WIDTH) * size, 0)}, backward=False,  # x, y; the state read and written
    )  # fmt: skip


def update_inputs(shape, dtype, device, seed):
    normal = functools.partial(torch.randn, generator=generator_of(seed, device), device=device)
    state = normal(*shape, WIDTH).to(dtype)
    weights = {"weight": normal(shape[1], WIDTH), "bias": normal(shape[1])}
    return {"x": normal(*shape).to(dtype), "conv_state": state, **weights}
