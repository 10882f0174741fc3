"""Calls of the rooms whose launches are prepared, and kinds of them that need a compiled form each."""

import torch
from step_inputs import at_types, step_inputs

from mamba_fast.ops.causal_conv1d import triton_conv
from mamba_fast.ops.rms_norm import triton_norm
from mamba_fast.ops.selective_state_update import triton_update

HALF, SINGLE = torch.bfloat16, torch.float32


def unaligned(v):
    """v, not at 16 bytes."""
    return torch.cat([v.flatten()[:1], v.flatten()])[1:].view(v.shape)


def apart(v):
    """v, with numbers of nobody between its rows."""
    return torch.cat([v, v], -1)[..., : v.shape[-1]]


def _normal(seed, device):
    generator = torch.Generator().manual_seed(seed)
    return lambda dtype, *shape: torch.randn(shape, generator=generator).to(device, dtype)


def norm(
    seed=0, device="cpu", x=HALF, weight=SINGLE, residual=SINGLE, dy=HALF, rms=True, bias=False, eps=1e-5,
    width=64, store=True, keep=True, at=torch.clone,
):  # fmt: skip
    """A forward and, where that keeps what it needs, a backward: a function of nothing, and its inputs."""
    normal = _normal(seed, device)
    x, dy = at(normal(x, 2, 5, width)), at(normal(dy, 2, 5, width))
    residual = None if residual is None else at(normal(residual, 2, 5, width))
    bias, weight = at(normal(weight, width)) if bias else None, at(normal(weight, width))

    def run():
        y, s, mean, rstd = triton_norm.forward(x, weight, bias, residual, eps, SINGLE, rms, store, keep)
        if not keep:
            return y, s
        of = (s, s, None) if store else (None, x, residual)
        grads = triton_norm.backward(dy, *of, weight, bias, mean, rstd, x.dtype, SINGLE, rms)
        return y, s, mean, rstd, *grads

    return run, (x, dy, residual, weight, bias)


NORMS = (
    {}, dict(x=SINGLE), dict(weight=HALF), dict(residual=HALF), dict(residual=None), dict(dy=SINGLE),
    dict(rms=False), dict(bias=True), dict(eps=1e-3), dict(width=100), dict(store=False), dict(keep=False),
    dict(store=False, residual=None), dict(at=unaligned), dict(at=apart),
)  # fmt: skip


def conv(
    seed=0, device="cpu", x=HALF, weight=SINGLE, dy=HALF, bias=True, packed=False, init=None, silu=True,
    channels=16, seqlen=200, width=4, at=torch.clone, columns=False,
):  # fmt: skip
    """A forward and a backward: a function of nothing, and its inputs."""
    normal = _normal(seed, device)
    x, dy = at(normal(x, 2, channels, seqlen)), at(normal(dy, 2, channels, seqlen))
    if columns:
        x, dy = (v.transpose(1, 2).contiguous().transpose(1, 2) for v in (x, dy))
    bias, weight = normal(weight, channels) if bias else None, at(normal(weight, channels, width))
    init = None if init is None else normal(init, 2, channels, width - 1)
    marks = (torch.arange(seqlen, device=device) // 60).expand(2, -1) if packed else None

    def run():
        y, _ = triton_conv.forward(x, weight, bias, marks, init, silu, False)
        return y, *triton_conv.backward(dy, None, x, weight, bias, marks, init, silu)

    return run, (x, dy, weight, bias, init)


CONVS = (
    {}, dict(x=SINGLE), dict(weight=HALF), dict(dy=SINGLE), dict(bias=False), dict(packed=True),
    dict(init=HALF), dict(silu=False), dict(channels=15), dict(width=3), dict(at=unaligned), dict(at=apart),
    dict(columns=True), dict(columns=True, x=SINGLE), dict(columns=True, bias=False),
    dict(columns=True, packed=True, init=HALF), dict(columns=True, channels=15),
)  # fmt: skip


def update(
    seed=0, device="cpu", batch=3, heads=0, channels=16, d_state=16, groups=1, tied=False, state=HALF,
    io=HALF, indices=False, softplus=True, width=None, without=(), at=torch.clone,
):  # fmt: skip
    """One update, which begins with the same state every time: a function of nothing, and its inputs."""
    sizes = batch, heads, width or channels, d_state, groups
    k = at_types(step_inputs(*sizes, seed=seed, tied=tied, device=device), state, io)
    k |= {"x": at(k["x"]), "dt_softplus": softplus} | dict.fromkeys(without)
    marks = torch.arange(batch, device=device).flip(0).int() if indices else None
    first, *rest = k.values()

    def run():
        now = first.clone()
        return triton_update.update(now, *rest, marks), now

    return run, (first, *rest[:8])


UPDATES = (
    {}, dict(batch=64, channels=200), dict(heads=4, groups=2), dict(heads=4, tied=True), dict(d_state=5),
    dict(state=SINGLE), dict(io=SINGLE), dict(indices=True), dict(softplus=False), dict(at=unaligned),
    dict(at=apart), dict(without=("D", "z", "dt_bias")),
)  # fmt: skip
