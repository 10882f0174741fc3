"""The rows of a result: every kernel of every case, checked first and then timed."""

import functools

import torch
from tqdm import tqdm

from mamba_fast.bench.case import as_tuple, type_name
from mamba_fast.bench.checks import check
from mamba_fast.bench.timing import device_ms, host_ms, limit_ms, peak_extra_bytes, speeds

MOST_COPIES = 1024


def run(cases, device):
    """Check all cases, then time them. Returns the speeds that limits are made of, and the rows."""
    errors = [check(case) for case in tqdm(cases, desc="check", leave=False)]
    machine, rows = speeds(device), []
    for case, found in zip(tqdm(cases, desc="time", leave=False), errors, strict=True):
        if case.timed:
            rows += rows_of(case, found, machine, device)
    return machine, rows


def rows_of(case, errors, machine, device):
    """One row for each kernel: case, shape, dtype, name, role, times in ms, errors, limits in ms."""
    copies = rotating(case, device)
    limits = {f"{kind}_limit": limit_ms(work, machine) for kind, work in case.work.items()}
    rows = []
    for kernel in case.kernels:
        row = {"case": case.name, "shape": case.shape, "dtype": type_name(case.dtype)}
        row |= {"name": kernel.name, "role": kernel.role}
        row |= times(case, kernel, copies, device) | limits
        rows.append(row | ({"errors": errors[kernel.name]} if kernel.name in errors else {}))
    return rows


def rotating(case, device):
    """Inputs as often as it takes to exceed the second-level cache four times."""
    first = case.make(0)
    if device.type != "cuda":
        return [first]
    size = sum(v.numel() * v.element_size() for v in first.values())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(case.make(k) for k in range(1, min(MOST_COPIES, -(-4 * cache // size))))]


def times(case, kernel, copies, device):
    """Device time forward and backward; for a thorough case on a GPU also host time and memory.

    "forward" runs without gradients, "forward_training" keeps what the backward reads, "backward" is
    the backward alone.
    """
    on_gpu, found = device.type == "cuda", {}
    with torch.no_grad():
        runs = [functools.partial(kernel.run, **tensors) for tensors in copies]
        found["forward"] = device_ms(lambda: runs, device)
        if on_gpu and case.thorough:
            found["forward_host"] = host_ms(runs[0])
    if not (case.backward and kernel.backward):
        return found
    leaves = [{k: _leaf(v) for k, v in tensors.items()} for tensors in copies]
    runs = [functools.partial(kernel.run, **tensors) for tensors in leaves]
    if case.thorough:
        found["forward_training"] = device_ms(lambda: runs, device)
    found["backward"] = device_ms(lambda: [_backward(kernel, tensors) for tensors in leaves], device)
    if on_gpu and case.thorough:
        found["backward_host"] = host_ms(_backward(kernel, leaves[0]))
        weights = [torch.randn_like(y) for y in as_tuple(runs[0]())]
        found["peak_extra_bytes"] = peak_extra_bytes(lambda: _gradients(runs[0](), leaves[0], weights))
    return found


def _leaf(tensor):
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _backward(kernel, leaves):
    """A function that runs the backward alone, as often as it is called."""
    out = as_tuple(kernel.run(**leaves))
    return functools.partial(_gradients, out, leaves, [torch.randn_like(y) for y in out], retain_graph=True)


def _gradients(out, leaves, weights, **options):
    grown = [v for v in leaves.values() if v.requires_grad]
    return torch.autograd.grad(as_tuple(out), grown, weights, **options)
