"""Whole models: the forward pass and the training step; on a CPU one block, beside its PyTorch rivals."""

import functools
import importlib
import sys

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from mamba_fast.bench import model_block
from mamba_fast.bench.case import Case, Kernel, generator_of
from mamba_fast.bench.rows import findings, measured, table
from mamba_fast.config import MambaConfig
from mamba_fast.model import MambaLMHeadModel

__all__ = ["cases", "findings", "table", "whole"]

SIZES = {"130m": (768, 24), "370m": (1024, 48), "1.4b": (2048, 48)}  # d_model, n_layer
VOCAB = 50277
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
    """The rows: time of a call with everything around it, tokens a second, peak memory on a GPU."""
    return model_block.whole(device, backend) if device.type == "cpu" else whole_models(device, peer)


def whole_models(device, peer):
    """A row for each model of each problem."""
    rows = []
    for name, problem in tqdm((FORWARD | STEP).items(), desc="time", leave=False):
        forward = name in FORWARD
        works = competitors(problem[0], device, peer, forward)
        ids = tokens_of(problem[1:], device, 0)
        calls = {
            n: functools.partial(_forward if forward else _step, model, ids) for n, model in works.items()
        }
        rows += measured(name, problem[1:], torch.bfloat16, calls, device)
    return rows


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


def competitors(size, device, peer, forward):
    """{name: module from ids to logits or loss}; all of them share one set of weights."""
    dtype = torch.bfloat16 if forward else torch.float32
    torch.manual_seed(0)
    ours = MambaLMHeadModel(config_of(size), device=device, dtype=dtype)
    found = {"ours": Logits(ours)} if forward else {"ours": Fused(ours), "ours, all logits": Plain(ours)}
    published = skeleton(size, True) if peer else None
    if published is not None:
        published.load_state_dict(ours.state_dict(), assign=True)
        published.tie_weights()
        found["published"] = (Logits if forward else Plain)(published)
    return found


def config_of(size):
    d_model, n_layer = SIZES[size]
    return MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=VOCAB)


def skeleton(size, published=False):
    """A model without weights: ours, or the published one; None where that cannot be imported."""
    config = config_of(size)
    with torch.device("meta"):
        if not published:
            return MambaLMHeadModel(config)
        try:
            module = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
            configs = importlib.import_module("mamba_ssm.models.config_mamba")
        except ImportError as error:
            print(f"published MambaLMHeadModel: not timed, {error}", file=sys.stderr)
            return None
        names = ("d_model", "n_layer", "vocab_size")
        return module.MambaLMHeadModel(configs.MambaConfig(**{k: getattr(config, k) for k in names}))


def tokens_of(shape, device, seed):
    return torch.randint(VOCAB, shape, generator=generator_of(seed, device), device=device)


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
        model = MambaLMHeadModel(config_of(size), device=device, dtype=dtype)
        weights = {k: v.detach() for k, v in model.named_parameters()}
        return {"input_ids": tokens_of(CHECKED, device, seed)} | weights

    def run(module, input_ids, **weights):
        options = {"backend": weights.pop("backend")} if "backend" in weights else {}
        half = not forward and weights["backbone.norm_f.weight"].dtype == torch.float32
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            weights = {f"model.{k}": v for k, v in weights.items()}
            return functional_call(module, weights, (input_ids,), options)

    ours, published = skeleton(size), skeleton(size, True) if peer else None
    plain = (Logits if forward else Plain)(ours)
    modules = {"ours": plain} if forward else {"ours": Fused(ours), "ours, all logits": plain}
    kernels = [Kernel(n, functools.partial(run, module)) for n, module in modules.items()]
    if published is not None:
        module = (Logits if forward else Plain)(published)
        kernels.append(Kernel("published", functools.partial(run, module), "peer"))
    return Case(
        name, CHECKED, torch.bfloat16, make, kernels, functools.partial(run, plain, backend="torch"),
        outputs=("logits" if forward else "loss",), backward=not forward, timed=False,
    )  # fmt: skip
