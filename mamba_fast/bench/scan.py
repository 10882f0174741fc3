"""The scan against its rivals: checked first, then timed, forward and backward.

Rivals on a GPU: the published CUDA kernel, where `mamba_ssm` is installed. On a CPU: a plain loop,
and PyTorch's own higher-order scan, compiled.
"""

import functools
import importlib

import torch
from tqdm import tqdm

from mamba_fast.bench.timing import device_ms, host_ms
from mamba_fast.ops.selective_scan import backends, selective_scan_fn

GPU_CASES = {
    "130m_train": (8, 1536, 2048, 16),
    "1.4b_train": (4, 4096, 2048, 16),
    "2.8b_8k": (1, 5120, 8192, 16),
    "2.8b_2k": (1, 5120, 2048, 16),
    "130m_64k": (1, 1536, 65536, 16),
    "small": (2, 256, 512, 16),
}
CPU_CASES = {"laptop": (2, 512, 2048, 16)}
K, FLOOR = 8, 4  # times the error of plain PyTorch, plus so many unit roundoffs: docs/numerics.md
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
FLOAT32 = ("A", "D", "delta_bias")


def inputs(shape, dtype, device, seed=0):
    """Arguments with step sizes and A as a new Mamba block has them; D, z, delta_bias all there."""
    batch, d_inner, seqlen, d_state = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, device=device)

    steps = torch.exp(torch.rand(d_inner, generator=generator, device=device) * 4.6 - 6.9)  # 1e-3 to 1e-1
    A = -torch.arange(1.0, d_state + 1, device=device) * torch.exp(normal(d_inner, d_state) / 10)
    tensors = (
        normal(batch, d_inner, seqlen), normal(batch, d_inner, seqlen), A, normal(batch, d_state, seqlen),
        normal(batch, d_state, seqlen), normal(d_inner), normal(batch, d_inner, seqlen),
        torch.log(torch.expm1(steps)),
    )  # fmt: skip
    return {k: v if k in FLOAT32 else v.to(dtype) for k, v in zip(NAMES, tensors, strict=True)}


def outcome(function, tensors):
    """y and every gradient of its sum with fixed random weights."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    y = function(*leaves.values(), True)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, list(leaves.values()), weight)]


def check(function, dtype, device):
    """Raise RuntimeError unless `function` agrees with plain PyTorch in float64 within the computed bound.

    The bound of a tensor is K times the error of plain PyTorch at `dtype`, which counts as at least
    the root mean square of its errors on all tensors of that type, plus FLOOR roundings.
    """
    tensors = inputs((2, 96, 600, 16), dtype, device, seed=1)
    plain = functools.partial(selective_scan_fn, backend="torch")
    truth = outcome(plain, {k: v.double() for k, v in tensors.items()})
    got, usual = outcome(function, tensors), outcome(plain, tensors)

    def error(x, want):
        return ((x.double() - want).norm() / want.norm()).item()

    low = [error(x, want) for x, want in zip(usual, truth, strict=True)]
    for name, x, want, mine in zip(("y", *(f"d{n}" for n in NAMES)), got, truth, low, strict=True):
        peers = [e for e, other in zip(low, usual, strict=True) if other.dtype == x.dtype]
        rms = (sum(e * e for e in peers) / len(peers)) ** 0.5
        allowed = K * max(mine, rms) + FLOOR * torch.finfo(x.dtype).eps / 2
        if not error(x, want) <= allowed:
            raise RuntimeError(
                f"{name}: error {error(x, want):.1e} is above the bound {allowed:.1e}: not timed"
            )


def rivals(device, peer):
    """Functions to time beside ours, by name."""
    found = {}
    if peer and device.type == "cuda":
        published = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        found["published"] = published.selective_scan_fn
    if device.type == "cpu":
        found["compiled higher-order scan"] = torch.compile(higher_order_scan, fullgraph=True)
        found["loop in PyTorch"] = loop
    return found


def higher_order_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
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


def loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """The recurrence as most people first write it. Indexing [..., t] makes its backward quadratic in L."""
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        A_bar = torch.exp(delta[:, :, t, None] * A)
        h = A_bar * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(ys, -1) + D[:, None] * u) * torch.nn.functional.silu(z)


def measure(function, tensors, device, backward=True):
    """Forward and backward times of one function on one set of inputs."""
    leaves = [v.detach().clone().requires_grad_(backward) for v in tensors.values()]
    with torch.no_grad():
        found = {"forward": device_ms(lambda: function(*leaves, True), device)}
        if device.type == "cuda":
            found["forward_host"] = host_ms(lambda: function(*leaves, True))
    if backward:
        weight = torch.randn_like(leaves[0])

        def both():
            torch.autograd.grad(function(*leaves, True), leaves, weight)

        found["forward_backward"] = device_ms(both, device)
    return found


def run(device, peer=False, backend=None):
    """Check, time, and return the rows of the result; progress on stderr."""
    dtypes = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,)
    names = [backend] if backend else [b for b in backends.available_backends(device) if b != "torch"]
    ours = {name: functools.partial(selective_scan_fn, backend=name) for name in names}
    others, rows = rivals(device, peer), []
    for dtype in dtypes:
        for function in ours.values():
            check(function, dtype, device)
        cases = GPU_CASES if device.type == "cuda" else CPU_CASES
        for case, shape in tqdm(cases.items(), desc=str(dtype).removeprefix("torch.")):
            tensors = inputs(shape, dtype, device)
            for name, function in (ours | others).items():
                times = measure(function, tensors, device, backward="compiled" not in name)
                rows.append(
                    {
                        "case": case,
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "name": name,
                        **times,
                    }
                )
    return rows


def report(rows):
    """The rows as a table: milliseconds, and the ratio of every rival's time to ours."""
    mine = {(r["case"], r["dtype"]): r for r in rows if r["name"] in backends.NAMES}
    kinds = ("forward", "forward_backward")
    lines = [
        f"{'case':<12}{'dtype':<10}{'name':<28}"
        f"{'forward ms':>11}{'fwd+bwd ms':>11}{'forward':>9}{'fwd+bwd':>9}"
    ]
    for r in rows:
        ours = mine[r["case"], r["dtype"]]
        times = "".join(f"{r[k]['median']:11.3f}" if k in r else " " * 11 for k in kinds)
        ratios = "".join(f"{r[k]['median'] / ours[k]['median']:8.2f}x" if k in r else " " * 9 for k in kinds)
        lines.append(f"{r['case']:<12}{r['dtype']:<10}{r['name']:<28}{times}{ratios}")
    return "\n".join(lines)
