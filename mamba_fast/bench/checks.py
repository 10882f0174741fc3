"""A kernel is timed only after its outputs and gradients agreed with plain PyTorch in float64."""

import torch

from mamba_fast.bench.case import as_tuple, generator_of

K, FLOOR = 8, 4  # times the error of plain PyTorch, plus so many unit roundoffs: docs/numerics.md
SEED = 1000  # of the checked inputs; the timed ones count from 0


class CheckFailed(RuntimeError):
    """A kernel of ours is further from the truth than its computed bound: nothing is written."""


def check(case):
    """{kernel: {tensor: relative error}}; raises CheckFailed if a kernel of ours is above a bound.

    The bound of a tensor is K times the error of plain PyTorch at the case's types, which counts as at
    least the root mean square of its errors on all tensors of that type, plus FLOOR roundings, plus what
    a sum in float32, term after term, may lose where PyTorch adds in a tree: of n terms of random sign,
    0.4 sqrt(n) roundings; sqrt(n) are allowed. n is the number of outputs for each number of a gradient.
    """
    tensors = case.make(SEED)
    checked = [kernel for kernel in case.kernels if kernel.role != "other"]
    weights = _weights(case, tensors, checked)
    truth, limits = _truth(case, tensors, weights)
    found = {}
    for kernel in checked:
        results = outcome(case, kernel.run, tensors, weights)
        found[kernel.name] = {n: _error(_cut(case, n, results[n]), want) for n, want in truth.items()}
        for name, limit in limits.items():
            error = found[kernel.name][name]
            if kernel.role == "ours" and not error <= limit:
                raise CheckFailed(
                    f"{case.title}, {kernel.name}, {name}: error {error:.1e} is above the bound {limit:.1e}"
                )
    return found


def outcome(case, run, tensors, weights):
    """Outputs and, where the case has a backward, the gradient of every float input, by name."""
    leaves = {k: v.detach().clone() for k, v in tensors.items()}
    if not case.backward:
        return dict(zip(case.outputs, as_tuple(run(**leaves)), strict=True))
    floats = {k: v.requires_grad_() for k, v in leaves.items() if v.is_floating_point()}
    out = as_tuple(run(**leaves))
    grads = torch.autograd.grad(out, list(floats.values()), weights)
    named = dict(zip(case.outputs, (y.detach() for y in out), strict=True))
    return named | {f"d{k}": g for k, g in zip(floats, grads, strict=True)}


def _weights(case, tensors, checked):
    """Random cotangents, one for each output."""
    if not case.backward:
        return None
    with torch.no_grad():
        out = as_tuple(checked[0].run(**{k: v.clone() for k, v in tensors.items()}))
    generator = generator_of(SEED, out[0].device)
    return [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in out]


def _truth(case, tensors, weights):
    """Float64 results and bounds by name, each tensor from the first view that keeps it."""
    truth, low = {}, {}
    for view in case.views:
        part = {k: view.part(k, v) for k, v in tensors.items()}
        cut = weights and [view.part(n, w) for n, w in zip(case.outputs, weights, strict=True)]
        wide = {k: v.double() if v.is_floating_point() else v for k, v in part.items()}
        exact = outcome(case, case.plain, wide, cut and [w.double() for w in cut])
        usual = outcome(case, case.plain, part, cut)
        for name, want in exact.items():
            if name not in truth and (view.keep is None or name in view.keep):
                truth[name], low[name] = want, (_error(usual[name], want), usual[name].dtype)
    limits = {}
    for name, (error, dtype) in low.items():
        alike = [e for e, other in low.values() if other == dtype]
        usual = (sum(e * e for e in alike) / len(alike)) ** 0.5
        limits[name] = K * max(error, usual) + FLOOR * torch.finfo(dtype).eps / 2
        limits[name] += _terms(case, name, tensors, weights) ** 0.5 * torch.finfo(torch.float32).eps / 2
    return truth, limits


def _terms(case, name, tensors, weights):
    """How many products a number of this gradient is a sum of; 1 for outputs."""
    if name in case.outputs:
        return 1
    return max(1, weights[0].numel() // tensors[name[1:]].numel())


def _cut(case, name, tensor):
    """The part of a result that the truth was computed for."""
    view = next(v for v in case.views if v.keep is None or name in v.keep)
    return view.part(name if name in case.outputs else name[1:], tensor)


def _error(x, want):
    return ((x.double() - want).norm() / want.norm()).item()
