"""Whole models: the forward pass and the training step; on a CPU one block, beside its PyTorch rivals."""

import functools
import sys

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from mamba_fast.bench import model_block
from mamba_fast.bench.case import Case, Kernel, generator_of
from mamba_fast.bench.generation_models import MAMBA, VOCAB, Ours, published
from mamba_fast.bench.rows import findings, measured, table
from mamba_fast.config import MambaConfig
from mamba_fast.model import MambaLMHeadModel

__all__ = ["cases", "findings", "table", "whole"]

FORWARD = {"130m forward": ("130m", 8, 2048)}  # size, batch, length
STEP = {"130m step": ("130m", 8, 2048), "370m step": ("370m", 8, 2048), "1.4b step": ("1.4b", 2, 2048)}
CHECKED = (2, 64)  # batch and length on which the truth is computed


def cases(device, peer, backend=None):
    """What is compared with float64: the logits of the forward, the loss and all gradients of a step."""
    if device.type == "cpu":
        return model_block.cases(device, backend)
    found = [_case(name, size, device, peer, True) for name, (size, *_) in FORWARD.items()]
    return found + [_case(name, size, device, peer, False) for name, (size, *_) in STEP.items()]


def whole(device, peer, backend=None):
    """The rows: time of a call with everything around it, tokens a second, peak memory on a GPU.

    There each call is timed twice: launched by Python, and replayed as one CUDA graph.
    """
    return model_block.whole(device, backend) if device.type == "cpu" else whole_models(device, peer)


def whole_models(device, peer):
    """A row for each model of each problem."""
    problems = tqdm((FORWARD | STEP).items(), desc="time", leave=False)
    return [row for name, problem in problems for row in _rows_of(name, problem, device, peer)]


def _rows_of(name, problem, device, peer):
    size, *shape = problem
    forward = name in FORWARD
    torch.manual_seed(0)
    modules = competitors(size, device, torch.bfloat16 if forward else torch.float32, peer)
    ids, call = tokens_of(shape, device, 0), _forward if forward else _step
    calls = {n: functools.partial(call, module, ids) for n, module in modules.items()}
    rows = measured(name, shape, torch.bfloat16, calls, device)
    if device.type == "cuda":
        graphs = {n: graph for n, call in calls.items() if (graph := captured(n, call))}
        rows += measured(f"{name}, one graph", shape, torch.bfloat16, graphs, device, memory=False)
    return rows


def captured(name, call):
    """A function that replays `call` from a CUDA graph, without Python; None (said) where that cannot be."""
    stream = torch.cuda.Stream()  # of the warm-up too: a backward runs on the stream of its forward
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    except RuntimeError as error:
        print(f"{name}: not captured, {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return graph.replay


class Plain(nn.Module):
    """The mean cross-entropy of a model's logits, all of them in memory."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, **options):
        logits = self.model(input_ids, **options).logits.flatten(0, 1)
        following = torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], 1)
        return cross_entropy(logits, following.flatten())


class Fused(Plain):
    """The same by :meth:`MambaLMHeadModel.loss`."""

    def forward(self, input_ids, **options):
        return self.model.loss(input_ids, **options)


class Logits(Plain):
    """The forward pass alone."""

    def forward(self, input_ids, **options):
        return self.model(input_ids, **options).logits


def competitors(size, device, dtype, peer):
    """{name: module from ids to logits, or in float32 to the loss}, which share one set of weights."""
    forward = dtype == torch.bfloat16
    ours = new_model(size, device, dtype)
    found = {"ours": Logits(ours)} if forward else {"ours": Fused(ours), "ours, all logits": Plain(ours)}
    theirs = published(Ours(ours)) if peer else None
    if theirs is not None:
        found["published"] = (Logits if forward else Plain)(theirs.model)
    return found


def new_model(size, device, dtype):
    d_model, n_layer = MAMBA[size]
    config = MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=VOCAB["mamba"])
    return MambaLMHeadModel(config, device=device, dtype=dtype)


def tokens_of(shape, device, seed):
    return torch.randint(VOCAB["mamba"], shape, generator=generator_of(seed, device), device=device)


def _forward(module, ids):
    with torch.no_grad():
        return module(ids)


def _step(module, ids):
    """Forward, loss, backward under bfloat16 autocast; the gradients are dropped at the end."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = module(ids)
    loss.backward()
    module.zero_grad(set_to_none=True)


def _case(name, size, device, peer, forward):
    """The check of one problem, on fewer tokens: every layer, every weight."""
    dtype = torch.bfloat16 if forward else torch.float32

    def make(seed):
        torch.manual_seed(seed)
        weights = {k: v.detach() for k, v in new_model(size, device, dtype).named_parameters()}
        return {"input_ids": tokens_of(CHECKED, device, seed)} | weights

    def run(module, input_ids, backend=None, **weights):
        options = {"backend": backend} if backend else {}
        half = not forward and weights["backbone.norm_f.weight"].dtype == torch.float32
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            weights = {f"model.{k}": v for k, v in weights.items()}
            return functional_call(module, weights, (input_ids,), options)

    modules = competitors(size, "meta", dtype, peer)  # no memory: the weights are arguments
    kernels = [
        Kernel(n, functools.partial(run, module), "peer" if n == "published" else "ours")
        for n, module in modules.items()
    ]
    plain = functools.partial(run, modules["ours" if forward else "ours, all logits"], backend="torch")
    return Case(
        name, CHECKED, torch.bfloat16, make, kernels, plain,
        outputs=("logits" if forward else "loss",), backward=not forward, timed=False,
    )  # fmt: skip
