"""The scan against its rivals: on a GPU the published kernel, on a CPU a loop and PyTorch's own scan."""

import functools
import shutil

import torch

from mamba_fast.bench.case import Case, Kernel, View, generator_of
from mamba_fast.bench.peers import peers
from mamba_fast.ops.selective_scan import backends, selective_scan_fn

GPU_CASES = {
    "130m_train": (8, 1536, 2048, 16),
    "1.4b_train": (4, 4096, 2048, 16),
    "2.8b_8k": (1, 5120, 8192, 16),
    "2.8b_2k": (1, 5120, 2048, 16),
    "130m_64k": (1, 1536, 65536, 16),
    "130m_512k": (1, 1536, 524288, 16),
    "small": (2, 256, 512, 16),
    "130m_train N=8": (8, 1536, 2048, 8),
    "130m_train N=32": (8, 1536, 2048, 32),
    "130m_train N=64": (8, 1536, 2048, 64),
}
IN_FLOAT32 = ("130m_train", "1.4b_train", "2.8b_8k", "2.8b_2k")
CPU_CASES = {"laptop": (2, 512, 2048, 16)}
FLOAT32 = ("A", "D", "delta_bias")
CHANNELS, TOKENS = 8, 16  # how much of a timed problem is compared with the truth


def cases(device, peer, backend=None):
    """The table's cases; `backend` keeps one kernel of ours."""
    if device.type == "cuda":
        wanted = [(n, s, torch.bfloat16) for n, s in GPU_CASES.items()]
        wanted += [(n, GPU_CASES[n], torch.float32) for n in IN_FLOAT32]
    else:
        wanted = [(n, s, torch.float32) for n, s in CPU_CASES.items()]
    kernels = [*ours(device, backend), *published(device, peer), *rivals(device)]
    return [scan_case(name, shape, dtype, device, kernels) for name, shape, dtype in wanted]


def scan_case(name, shape, dtype, device, kernels, **options):
    """A case of the scan with D, z, delta_bias and softplus."""
    batch, d_inner, seqlen, d_state = shape
    wide, thin, size = batch * d_inner * seqlen, batch * d_state * seqlen, dtype.itemsize
    return Case(
        name, shape, dtype, functools.partial(inputs, shape, dtype, device), kernels,
        plain=functools.partial(selective_scan_fn, delta_softplus=True, backend="torch"),
        views=(View(_channels, tuple("y du ddelta dA dD dz ddelta_bias".split())),
               View(_first_tokens, ("dC",)), View(_last_tokens, ("dB",))),
        work={"forward": ((4 * wide + 2 * thin) * size, wide * d_state),  # u, delta, z, y; B, C
              "backward": ((7 * wide + 4 * thin) * size, wide * d_state)},  # and dy, du, ddelta, dz; dB, dC
        **options,
    )  # fmt: skip


def inputs(shape, dtype, device, seed):
    """Arguments with step sizes and A as a new Mamba block has them; D, z, delta_bias all there."""
    batch, d_inner, seqlen, d_state = shape
    generator = generator_of(seed, device)

    def normal(*size, dtype=dtype):
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    steps = torch.exp(torch.rand(d_inner, generator=generator, device=device) * 4.6 - 6.9)  # 1e-3 to 1e-1
    A = -torch.arange(1.0, d_state + 1, device=device)
    return {
        "u": normal(batch, d_inner, seqlen),
        "delta": normal(batch, d_inner, seqlen),
        "A": A * torch.exp(normal(d_inner, d_state, dtype=torch.float32) / 10),
        "B": normal(batch, d_state, seqlen),
        "C": normal(batch, d_state, seqlen),
        "D": normal(d_inner, dtype=torch.float32),
        "z": normal(batch, d_inner, seqlen),
        "delta_bias": torch.log(torch.expm1(steps)),
    }


def _channels(name, tensor):
    """Channels do not meet: a few of them are the whole problem, but for dB and dC."""
    if name in ("B", "C"):
        return tensor
    return tensor[-CHANNELS:] if name in FLOAT32 else tensor[:, -CHANNELS:]


def _first_tokens(name, tensor):
    """dC_t = h_t dy_t, and the state h_t depends on the past alone."""
    return tensor if name in FLOAT32 else tensor[..., :TOKENS]


def _last_tokens(name, tensor):
    """dB_t = Δ_t u_t g_t, and the adjoint g_t depends on the future alone."""
    return tensor if name in FLOAT32 else tensor[..., -TOKENS:]


def ours(device, backend=None):
    """Our fused kernels on this device, the default one first; plain PyTorch where there is no other."""
    interpreted = ("triton",) if device.type == "cpu" else ()
    names = [name for name in backends.available_backends(device) if name not in ("torch", *interpreted)]
    names = [backend] if backend else names or ["torch"]
    return [
        Kernel(name, functools.partial(selective_scan_fn, delta_softplus=True, backend=name))
        for name in names
    ]


def published(device, wanted):
    """The published kernel, or nothing."""
    return peers("scan", device, wanted, lambda function: functools.partial(function, delta_softplus=True))


def rivals(device):
    """What a reader would write instead, on a CPU."""
    if device.type != "cpu":
        return []
    found = [Kernel("loop in PyTorch", loop, "other")]
    if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        run = torch.compile(higher_order_scan, fullgraph=True)
        found.insert(0, Kernel("compiled higher-order scan", run, "other", backward=False))
    return found


def higher_order_scan(u, delta, A, B, C, D, z, delta_bias):
    """The recurrence by torch's higher-order scan, forward only; meant to be compiled."""
    from torch._higher_order_ops.scan import scan

    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])

    def step(h, at):
        Delta, x, B_t, C_t = at
        h = torch.exp(Delta[..., None] * A) * h + (Delta * x)[..., None] * B_t[:, None]
        return h, (h * C_t[:, None]).sum(-1)

    along = (delta.permute(2, 0, 1), u.permute(2, 0, 1), B.permute(2, 0, 1), C.permute(2, 0, 1))
    _, y = scan(step, u.new_zeros(*u.shape[:2], A.shape[1]), along)
    return (y.permute(1, 2, 0) + D[:, None] * u) * torch.nn.functional.silu(z)


def loop(u, delta, A, B, C, D, z, delta_bias):
    """The recurrence as most people first write it. Indexing [..., t] makes its backward quadratic in L."""
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        A_bar = torch.exp(delta[:, :, t, None] * A)
        h = A_bar * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(ys, -1) + D[:, None] * u) * torch.nn.functional.silu(z)
