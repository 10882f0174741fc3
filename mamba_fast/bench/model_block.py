"""One block of the 130m model on a CPU, beside two written in PyTorch, where they can be imported."""

import functools
import importlib
import sys

import torch
from torch.func import functional_call

from mamba_fast.bench.case import Case, Kernel, generator_of
from mamba_fast.bench.rows import measured
from mamba_fast.mixer import Mamba

SHAPES = {"130m block": (1, 512, 768)}  # batch, length, d_model
CHECKED = 64  # tokens on which the truth is computed: a rival's backward is quadratic in them


def cases(device, backend=None):
    """Output and every gradient of the block against float64."""
    return [_case(name, shape, device, backend) for name, shape in SHAPES.items()]


def whole(device, backend=None):
    """Two rows a block and model: the forward pass alone; forward and backward."""
    rows = []
    for name, shape in SHAPES.items():
        x = inputs(shape, device, 0)["x"]
        blocks = competitors(shape[2], device, backend)
        for kind, call in (("forward", _forward), ("step", _step)):
            calls = {n: functools.partial(call, block, x) for n, block in blocks.items()}
            rows += measured(f"{name} {kind}", shape[:2], x.dtype, calls, device)
    return rows


def competitors(d_model, device, backend=None):
    """{name: callable from (B, L, d_model) to the same}, with the same weights."""
    torch.manual_seed(0)
    ours = Mamba(d_model, device=device)
    found = {"ours": functools.partial(ours, backend=backend) if backend else ours}
    for name, make in (("transformers", of_transformers), ("mamba.py", of_mambapy)):
        block = _imported(name, make, d_model)
        if block is not None:
            block.load_state_dict(ours.state_dict())
            found[name] = block.to(device)
    return found


def of_transformers(d_model):
    """The mixer of transformers, whose slow path is taken where no kernels are installed."""
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    config = importlib.import_module("transformers").MambaConfig(hidden_size=d_model, num_hidden_layers=1)
    return module.MambaMixer(config, layer_idx=0)


def of_mambapy(d_model):
    """The block of mamba.py: a parallel scan of log L passes over all states, in PyTorch."""
    module = importlib.import_module("mambapy.mamba")
    return module.MambaBlock(module.MambaConfig(d_model=d_model, n_layers=1))


def inputs(shape, device, seed):
    """x (B, L, d_model) and the weights of a new block, by their names."""
    torch.manual_seed(seed)
    weights = {k: v.detach() for k, v in Mamba(shape[2], device=device).named_parameters()}
    return {"x": torch.randn(shape, generator=generator_of(seed, device), device=device)} | weights


def _case(name, shape, device, backend):
    blocks = competitors(shape[2], device)
    kernels = [
        Kernel(n, functools.partial(_call, b, {"backend": backend} if n == "ours" else {}), _role(n))
        for n, b in blocks.items()
    ]
    plain = functools.partial(_call, blocks["ours"], {"backend": "torch"})
    shape = (shape[0], min(CHECKED, shape[1]), shape[2])
    make = functools.partial(inputs, shape, device)
    return Case(name, shape, torch.float32, make, kernels, plain, timed=False)


def _role(name):
    return "ours" if name == "ours" else "peer"


def _call(block, options, x, **weights):
    return functional_call(block, weights, (x,), options)


def _forward(block, x):
    with torch.no_grad():
        return block(x)


def _step(block, x):
    """Forward and backward, to x and to every weight."""
    x = x.detach().requires_grad_()
    y = block(x)
    weights = (block.func if isinstance(block, functools.partial) else block).parameters()
    return torch.autograd.grad(y, [x, *weights], torch.ones_like(y))


def _imported(name, make, d_model):
    try:
        return make(d_model)
    except ImportError as error:
        print(f"{name}: not timed, {error}", file=sys.stderr)
        return None
