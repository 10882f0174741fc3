"""The training loop: steps, a line of metrics now and then, checkpoints, a curve at the end."""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from mamba_fast.model import MambaLMHeadModel
from mamba_fast.train import checkpoint
from mamba_fast.train.graph import GraphedStep
from mamba_fast.train.metrics import Metrics, draw_curve, read_metrics
from mamba_fast.train.run import Run, repeatable
from mamba_fast.train.tasks import IGNORED


class Result(NamedTuple):
    """What a run leaves: the trained model, how many steps it took, its metrics, and its folder."""

    model: nn.Module
    step: int
    metrics: list
    seconds: float
    out: Path


def train(config, *, model=None, data=None, hooks=(), processes=None):
    """Train by `config`, going on where the run in config.out was; a :class:`Result`.

    Parameters
    ----------
    config : a :class:`TrainConfig`
    model, data : in place of those that the config describes
    hooks : each is called as hook(run, line) behind every validation, with the :class:`Run` and the line of
        metrics that will be written, to which it may add; one that returns True ends the run there. Started
        again, they are asked once more, and the run goes on if none of them wants its end any longer.
    processes : ``processes_of(config)`` where several of torch.distributed share the steps. All of them call
        this, and read the checkpoint; rank 0 alone writes.

    In config.out: checkpoints/, metrics.jsonl, curve.png, and model/, with the tokenizers file of the text,
    when the run has ended. It can be killed at any moment; started again it takes the same steps to the bit.
    """
    with repeatable(config.deterministic):
        run = Run(config, model, data, processes)
        out = Path(config.out)
        found = checkpoint.load_latest(out / "checkpoints")
        if found:
            run.load_state(found[1])
        out.mkdir(parents=True, exist_ok=True)
        if run.finished and run.step < config.steps:
            run.finished = _still_ended(run, out / "metrics.jsonl", hooks)
        metrics = Metrics(out / "metrics.jsonl", run.step) if run.processes.rank == 0 else None
        if not run.finished:
            _take_steps(run, metrics, hooks)
    whole = run.processes.whole(run.model)
    if metrics:
        draw_curve(metrics.lines, out / "curve.png")
        if isinstance(whole, MambaLMHeadModel):
            whole.save_pretrained(out / "model")
            if config.data.get("tokenizer"):
                shutil.copyfile(config.data["tokenizer"], out / "model" / "tokenizer.json")
    return Result(run.model, run.step, metrics.lines if metrics else [], run.seconds, out)


def _still_ended(run, path, hooks):
    """Do the hooks, given the last line of the run that one of them ended, say so again?"""
    lines = [line for line in read_metrics(path) if line["step"] <= run.step]
    return not (hooks and lines) or any([hook(run, lines[-1]) for hook in hooks])


def _take_steps(run, metrics, hooks):
    config = run.config
    advance = GraphedStep(run) if config.graph else run.advance
    clock = Clock(run)
    with tqdm(total=config.steps, initial=run.step, unit="step", disable=metrics is None) as bar:
        while run.step < config.steps and not run.finished:
            run.begin_step()
            loss, norm = advance()
            run.step += 1
            bar.update()
            last = run.step == config.steps
            evaluating = config.eval_every and (last or run.step % config.eval_every == 0)
            if last or evaluating or run.step % config.log_every == 0:
                loss = float(run.processes.mean(loss))
                line = {"step": run.step, "loss": loss, "grad_norm": float(norm), "lr": run.lr}
                line |= clock.read(run)
                if evaluating:
                    line |= evaluate(run.objective, run.data.validation(config.eval_batches))
                    run.finished = any([hook(run, line) for hook in hooks])
                    clock.skip()
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['tokens_per_s']:,.0f} tokens/s")
                if metrics:
                    metrics.add(line)
            run.finished |= last
            if run.finished or run.step % config.save_every == 0:
                state = run.state()
                if metrics:
                    checkpoint.save(metrics.path.parent / "checkpoints", run.step, state)
    run.finished = True


class Clock:
    """Time spent on steps, and tokens per second since it was last read."""

    def __init__(self, run):
        self.step, self.since = run.step, time.perf_counter()

    def read(self, run):
        """Fields for a line of metrics; reading a loss before this has waited for the GPU."""
        spent = time.perf_counter() - self.since
        tokens = (run.step - self.step) * run.rows_per_step * run.config.seqlen
        run.seconds += spent
        self.step, self.since = run.step, time.perf_counter()
        return {"seconds": round(run.seconds, 3), "tokens_per_s": round(tokens / spent, 1)}

    def skip(self):
        """Leave out the time since the last reading."""
        self.since = time.perf_counter()


@torch.no_grad()
def evaluate(objective, batches):
    """{"validation_loss", "validation_accuracy"}: means over all labels of `batches` that count.

    {} if there are no batches. The accuracy is left out for text, whose logits would not fit in memory.
    """
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        here = (batch.labels != IGNORED).sum().item()
        loss += objective(batch).item() * here
        count += here
        if batch.last:
            logits, labels = objective.logits(batch)
            right += (logits.argmax(-1) == labels).sum().item()
    if not count:
        return {}
    loss, right = objective.whole(loss, right)
    found = {"validation_loss": loss / count}
    return found | {"validation_accuracy": right / count} if batch.last else found
