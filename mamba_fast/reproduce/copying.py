"""Selective copying: what the SSM of a Mamba block must be able to choose by its input.

Paper: section 4.1.1, table 1, appendix E.1: length 4096, 16 tokens to copy, vocabulary 16, 2 layers, d_model
64, batch 64, 400,000 steps at a constant 1e-4. Here at a higher rate, and a run ends by the clock; the
subsets at a smaller size take the same number of steps.
"""

from dataclasses import replace
from itertools import chain, combinations

import torch

from mamba_fast.config import MambaConfig
from mamba_fast.reproduce import report
from mamba_fast.reproduce.partly import ALL, partly_selective_model
from mamba_fast.train import load_config, train
from mamba_fast.train.tasks import copying_data

TITLE = "Selective copying: tokens copied right, by what depends on the input"
PAPER = {ALL: 99.8, (): 56.4}  # table 1, in percent: the Mamba block with S6, and with S4
SYMBOLS = {"delta": "Δ", "B": "B", "C": "C"}
TABLE_1 = {"lr": 2e-3, "warmup": 200, "eval_every": 100, "eval_batches": 2}
SMALL = TABLE_1 | {
    "seqlen": 256, "data.n_tokens": 8, "dtype": "float32", "steps": 3000, "save_every": 10**6,
}  # fmt: skip
QUICK = SMALL | {
    "seqlen": 32, "data.n_tokens": 4, "batch_size": 32, "model.d_model": 32, "steps": 1500, "warmup": 20,
    "eval_every": 50, "log_every": 50,
}  # fmt: skip
CHANCE = 100 / (16 - 2)  # of so many data tokens
SHOWN = 32  # points of a curve


def run(options):
    """Rows {"task", "selective", "tokens", "sequences", "paper", ...}: accuracies in percent."""
    rows, curves = [], []
    jobs = [(QUICK if options.quick else SMALL, subset, 0.25) for subset in subsets()]
    if not options.quick:
        jobs = [(TABLE_1, ALL, 1), (TABLE_1, (), 1), *jobs]
    for changes, selective, share in jobs:
        for seed in options.seeds:
            row, curve = trained(options, changes, selective, seed, share * options.minutes)
            rows.append(row)
            curves += curve
            yield {"chance": CHANCE, "findings": findings(rows), "rows": rows, "curves": curves}


def subsets():
    """All 8 of them, the largest first."""
    return list(chain(*(combinations(ALL, n) for n in (3, 2, 1, 0))))


def name_of(selective):
    return ", ".join(SYMBOLS[name] for name in selective) or "none (LTI)"


def trained(options, changes, selective, seed, minutes):
    """One run: its row, and its curve of validation accuracy."""
    device = options.device
    config = load_config("copying", changes | {"seed": seed, "device": device.type, "graph": False})
    tokens = config.data.get("n_tokens", 16)
    task = f"{tokens} of {config.seqlen}"
    folder = options.work / f"copying-{config.seqlen}-{''.join(selective) or 'none'}-{seed}"
    config = replace(config, out=str(folder), graph=device.type == "cuda")
    torch.manual_seed(seed)
    model = partly_selective_model(MambaConfig(**{"vocab_size": 16} | config.model), selective)

    def hook(run, line):
        return line["validation_accuracy"] == 1 or line["seconds"] > 60 * minutes

    result = train(config, model=model, hooks=[hook])
    lines = [line for line in result.metrics if "validation_accuracy" in line]
    right = correct(result.model, config)
    row = {
        "task": task, "selective": name_of(selective), "tokens": report.percent(right.mean().item()),
        "sequences": report.percent(right.all(1).double().mean().item()),
        "paper": PAPER.get(selective) if config.seqlen == 4096 else None, "steps": result.step,
        "batch": config.batch_size, "lr": config.lr, "minutes": result.seconds / 60, "seed": seed,
    }  # fmt: skip
    kept = lines[:: -(-len(lines) // SHOWN)]
    curve = [
        {
            "task": task, "selective": row["selective"], "seed": seed, "step": line["step"],
            "tokens": report.percent(line["validation_accuracy"]),
        }
        for line in kept
    ]  # fmt: skip
    return row, curve


@torch.no_grad()
def correct(model, config, batches=4):
    """Which of the tokens to copy are right, (rows, tokens) bool, on rows that no training step has drawn."""
    data, found = copying_data(replace(config, seed=config.seed + 1), **config.data), []
    for batch in data.validation(batches):
        logits = model(batch.input_ids, num_last_tokens=batch.last).logits
        found.append(logits.argmax(-1) == batch.labels[:, -batch.last :])
    return torch.cat(found).double()


def findings(rows):
    """A sentence a task: what each subset copies."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        found = {}
        for row in rows:
            if row["task"] == task:
                found.setdefault(row["selective"], []).append(row["tokens"])
        told = [f"{name}: {' / '.join(f'{v:.1f}' for v in tokens)}" for name, tokens in found.items()]
        lines.append(f"{task} tokens, copied right in percent, a number a seed: {'; '.join(told)}")
    return lines


def figure(plt, result):
    """A panel a task: a bar for each subset, the paper's number as a ring; then the curves."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    fig, axes = plt.subplots(len(tasks), 2, figsize=(11, 0.6 + 3.0 * len(tasks)), squeeze=False)
    for (bars, curves), task in zip(axes, tasks, strict=True):
        rows = [row for row in result["rows"] if row["task"] == task]
        names = list(dict.fromkeys(row["selective"] for row in rows))
        colors = dict(zip(names, [report.OURS, *report.OTHERS, "0.5"], strict=False))
        for row in rows:
            place = names.index(row["selective"])
            bars.barh(place, row["tokens"], 0.7, color=colors[row["selective"]], alpha=0.6)
            if row["paper"]:
                bars.plot(row["paper"], place, "o", ms=10, mfc="none", color=report.PAPER)
        bars.axvline(result["chance"], color="black", lw=1)
        bars.set_yticks(range(len(names)), names)
        bars.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 103))
        bars.set(xlabel="tokens right (%), a shade a seed; line: chance")
        bars.set_title(f"{task} tokens" + "; rings: paper" * bool(rows[0]["paper"]))
        for name in names:
            for seed in {row["seed"] for row in rows}:
                mine = [c for c in result["curves"]
                        if (c["task"], c["selective"], c["seed"]) == (task, name, seed)]  # fmt: skip
                curves.plot(
                    [c["step"] for c in mine], [c["tokens"] for c in mine], color=colors[name], lw=1.5
                )
        curves.set(xlabel="training step", ylabel="tokens right (%)", ylim=(0, 103))
    return fig
