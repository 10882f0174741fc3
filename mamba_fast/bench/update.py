"""One token through the recurrence, many sequences at a time: what decoding does in every layer."""

import functools

import torch

from mamba_fast.bench.case import Case, generator_of
from mamba_fast.bench.conv import kernels
from mamba_fast.bench.peers import peers
from mamba_fast.ops.selective_state_update import selective_state_update

GPU_CASES = {  # batch, heads (0: none), channels of a head, N
    "batch 1": (1, 0, 5120, 16),
    "batch 16": (16, 0, 5120, 16),
    "batch 64": (64, 0, 5120, 16),
    "batch 256": (256, 0, 5120, 16),
    "80 heads, tied": (64, 80, 64, 128),
}
CPU_CASES = {"batch 4": (4, 0, 256, 16), "4 heads, tied": (4, 4, 32, 16)}


def cases(device, peer, backend=None):
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    run = in_place(selective_state_update)
    competitors = [*kernels(run, device, backend), *peers("update", device, peer, in_place)]
    return [
        Case(
            name, shape, dtype, functools.partial(inputs, shape, dtype, device), competitors,
            plain=functools.partial(run, backend="torch"), outputs=("y", "state"), backward=False,
            work={"forward": work(shape, dtype)},
        )
        for name, shape in (GPU_CASES if gpu else CPU_CASES).items()
    ]  # fmt: skip


def in_place(function):
    """function as one that returns the state it changed too; A, dt and dt_bias of a head are one number."""

    def run(state, dt, A, dt_bias, **tensors):
        dt, dt_bias = (v.expand(*v.shape[:-1], state.shape[-2]) for v in (dt, dt_bias))
        A = A.expand(*A.shape[:-2], *state.shape[-2:])
        y = function(state=state, dt=dt, A=A, dt_bias=dt_bias, dt_softplus=True, **tensors)
        return y, state

    return run


def inputs(shape, dtype, device, seed):
    """Tokens and state in dtype, weights in float32; with heads, one Δ and one A a head."""
    batch, heads, channels, d_state = shape
    generator = generator_of(seed, device)

    def normal(*size, dtype=torch.float32):
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    inner = (heads, channels) if heads else (channels,)
    tied = (heads, 1) if heads else (channels,)
    groups = (1,) if heads else ()
    return {
        "state": normal(batch, *inner, d_state, dtype=dtype),
        "x": normal(batch, *inner, dtype=dtype),
        "dt": normal(batch, *tied, dtype=dtype),
        "A": -normal(*tied, 1 if heads else d_state).abs() - 0.1,
        "B": normal(batch, *groups, d_state, dtype=dtype),
        "C": normal(batch, *groups, d_state, dtype=dtype),
        "D": normal(*inner),
        "z": normal(batch, *inner, dtype=dtype),
        "dt_bias": normal(*tied).abs() / 2,
    }


def work(shape, dtype):
    """Bytes: every input once, y, and the state a second time. Exponentials: one a state, one a tied head."""
    batch, heads, channels, d_state = shape
    inner, steps = max(heads, 1) * channels, heads or channels
    decays = steps * (1 if heads else d_state)
    tokens = batch * (2 * inner * d_state + 3 * inner + steps + 2 * d_state)  # state; x, z, y; dt; B, C
    return tokens * dtype.itemsize + 4 * (inner + steps + decays), batch * decays
