"""transformers' MambaForCausalLM without kernels, with ours by mamba_fast.compat, with the published ones.

    PYTHONPATH=.:tests python tests/compat_speed.py

The 130m shape with random weights, batch 2, length 256, on a GPU if there is one. Logits and gradients in
float32 are compared with mamba_ref in float64 first, within the error of transformers' own slow path; then
forward and backward are timed, in ms. `--small` is a tiny shape for a CPU. The published packages take part
where they can be imported.
"""

import importlib
import importlib.util
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mamba_fast import compat
from mamba_ref import MambaLM
from mamba_ref.checks import bound, bounds, check

PACKAGES = ("mamba_ssm", "causal_conv1d")
TURNS = {"slow": 1}  # 20 of the others


@dataclass(frozen=True)
class Shape:
    width: int = 768
    layers: int = 24
    vocab: int = 50277
    batch: int = 2
    length: int = 256


def modules():
    """transformers' module of the model, run anew for each set of kernels: it looks while it is imported."""
    found, kept = {}, imported_models()
    kept |= {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in PACKAGES}
    sys.modules.update(dict.fromkeys(PACKAGES))  # None: cannot be imported
    found["slow"] = fresh("slow")
    for name in PACKAGES:
        del sys.modules[name]
    imported_models()
    with compat.register(force=True):
        found["ours"] = fresh("ours")
    if all(map(importlib.util.find_spec, PACKAGES)):
        found["published"] = fresh("published")
    imported_models()
    sys.modules.update(kept)
    return found


def imported_models():
    """The modules of models that transformers has imported so far, taken out of sys.modules."""
    names = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
    names += [name for name in sys.modules if name.rpartition(".")[0] == "transformers.models.mamba"]
    return {name: sys.modules.pop(name) for name in dict.fromkeys(names)}


def fresh(name):
    """The module of transformers' Mamba, run anew under this name."""
    folder = importlib.import_module("transformers.models.mamba").__path__[0]
    spec = importlib.util.spec_from_file_location(
        f"transformers.models.mamba.{name}", f"{folder}/modeling_mamba.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def theirs(module, reference, shape):
    config = module.MambaConfig(
        hidden_size=shape.width, num_hidden_layers=shape.layers, tie_word_embeddings=True,
        vocab_size=len(reference.backbone.embedding.weight),
    )  # fmt: skip
    model = module.MambaForCausalLM(config).float().train()
    model.load_state_dict(_their_names(reference.state_dict()))
    return model.to(reference.backbone.embedding.weight.device)


def _their_names(named):
    return {name.replace("embedding.", "embeddings."): value for name, value in named.items()}


def step(model, ids):
    """Gradients of the mean loss of the next tokens; returns the logits."""
    model.zero_grad(set_to_none=True)
    logits = model(ids) if isinstance(model, MambaLM) else model(ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach()


def outcome(model, ids):
    """{"logits": ..., each parameter: its gradient}, in float64 on the CPU."""
    logits = step(model, ids)
    grads = {name: p.grad.double().cpu() for name, p in model.named_parameters()}
    return {"logits": logits.double().cpu()} | _their_names(grads)


def clock(call, turns):
    spent = []
    for _ in range(turns + 1):  # the first is for compilers and caches
        _finish()
        start = time.perf_counter()
        call()
        _finish()
        spent.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent[1:])


def _finish():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(shape=None):
    """Print what agrees and how long it takes; returns {(type, work): {kernels: ms}}."""
    shape, device = shape or Shape(), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    reference = MambaLM(shape.width, shape.layers, shape.vocab).double().to(device)
    ids = torch.randint(shape.vocab, (shape.batch, shape.length), device=device)
    want, models = outcome(reference, ids), {}
    limits = None
    for name, module in modules().items():
        models[name] = theirs(module, reference, shape)
        got = outcome(models[name], ids)
        limits = limits or bounds(got, want) | {"logits": bound(got["logits"], want["logits"])}
        for what, limit in limits.items():
            check(f"{name}, {what}", got[what], want[what], limit)
    del reference, want, got
    return timed(models, ids, device)


def timed(models, ids, device):
    rows = {}
    for half in (False, True):
        kind = "bfloat16 autocast" if half else "float32"
        for work in ("forward + backward", "forward"):
            times = rows[kind, work] = {}
            for name, model in models.items():

                def call(model=model, half=half, work=work):
                    with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
                        if work != "forward":
                            step(model, ids)
                            return
                        with torch.no_grad():
                            model(ids, use_cache=False)

                times[name] = clock(call, TURNS.get(name, 20))
            print(kind, work, {name: round(ms, 1) for name, ms in times.items()}, flush=True)
    return rows


if __name__ == "__main__":
    main(Shape(32, 2, 90, 2, 40) if "--small" in sys.argv[1:] else None)
