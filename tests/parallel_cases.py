"""Runs of training that several processes and one must take alike."""

import torch
from train_inputs import tiny

from mamba_fast.train import Run, train
from mamba_fast.train.run import model_of

KINDS = ("ddp", "fsdp", "sequence")
TEXT = dict(batch_size=1, accumulate=2, seqlen=23, steps=4, eval_every=2, eval_batches=3, clip=0.5)
CASES = {
    "packed rows": TEXT,
    "one document, checkpointing": TEXT | {"folder": "one", "gradient_checkpointing": True},
    "bfloat16": TEXT | {"dtype": "bfloat16"},
    "float16": TEXT | {"dtype": "float16"},
    "copying": {"task": "copying", "accumulate": 2, "seqlen": 24, "eval_every": 2, "data": {"n_tokens": 15}},
    "induction": {"task": "induction", "seqlen": 25, "eval_every": 2},
}
STOPPED = TEXT | {"steps": 8, "save_every": 3, "eval_every": 5}  # behind step 5, with the checkpoint of 3
MOVED = {"ddp": 2, "fsdp": 2, "sequence": 6}  # accumulate of three processes that take 6 rows a step


def made(base, name, settings, **changes):
    """The configuration of a run in base/name and its model, in float64 where autocast does nothing."""
    settings = settings | changes
    folder = settings.pop("folder", "texts")
    if "task" not in settings:
        settings["data"] = {"folder": str(base / folder), "validation": 0.1, "cache": str(base / "tokens")}
    config, model = tiny(base, out=str(base / name), **settings), None
    if config.dtype == "float32":
        torch.manual_seed(0)
        model = model_of(config, 256 if config.task == "text" else 16).double()
    return config, model


def take(base, name, settings, processes=None, hooks=(), **changes):
    """Train in base/name."""
    config, model = made(base, name, settings, **changes)
    return train(config, model=model, processes=processes and processes(config), hooks=hooks)


def first_logits(base, processes=None):
    """Logits of a run that has taken no step."""
    config, model = made(base, "logits", CASES["copying"], parallel="fsdp")
    run = Run(config, model, processes=processes and processes(config))
    return run.objective.logits(run.data.next())[0].detach()
