"""Selective copying: what the SSM of a Mamba block must be able to choose by its input.

Paper: section 4.1.1, table 1, appendix E.1: length 4096, 16 tokens to copy, vocabulary 16, 2 layers, d_model
64, batch 64, 400,000 steps at a constant 1e-4, all at length 4096. Here the task, the model and the batch are
the paper's and the schedule is not: a run trains on short rows first, then on longer ones, the parameters
carried on, at a higher rate that falls to the paper's. What is tested is always the last length. Selective
or not, the stages, steps, rates and the rule that ends a stage early are the same.
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
COMMON = {"warmup": 200, "eval_every": 100, "eval_batches": 2}
TABLE_1 = COMMON | {
    "lr": 3e-3, "schedule": "cosine", "final_lr": 1e-4,  # in each stage
    "stages": ((64, 12000), (256, 4000), (1024, 2500), (4096, 4000)),  # length, steps at most
}  # fmt: skip
SMALL = COMMON | {
    "lr": 2e-3, "stages": ((256, 6000),), "data.n_tokens": 8, "dtype": "float32", "save_every": 10**6,
}  # fmt: skip
QUICK = SMALL | {
    "stages": ((32, 1500),), "data.n_tokens": 4, "batch_size": 32, "model.d_model": 32, "warmup": 20,
    "eval_every": 50, "log_every": 50,
}  # fmt: skip
DONE = 0.995  # validation accuracy that ends a stage before its steps do; the last one ends at 1
CHANCE = 100 / (16 - 2)  # of so many data tokens
SHOWN = 32  # points of a stage's curve


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


def settings(options, changes, selective, seed):
    """A :class:`TrainConfig` for each stage; what is selective changes the folder alone."""
    *_, (longest, _) = stages = changes["stages"]
    folder = options.work / f"copying-{longest}-{''.join(selective) or 'none'}-{seed}"
    changes = {k: v for k, v in changes.items() if k != "stages"}
    changes |= {"device": options.device.type, "graph": options.device.type == "cuda"}
    return [
        load_config("copying", changes | {
            "out": str(folder / f"stage-{k}"), "seqlen": seqlen, "steps": steps,
            "seed": seed + 1000 * k,  # else a stage would ask for the letters of the one before again
        })
        for k, (seqlen, steps) in enumerate(stages)
    ]  # fmt: skip


def ends(accuracy, seconds):
    """A hook that ends a stage at that validation accuracy, or when these seconds are over."""

    def hook(run, line):
        return line["validation_accuracy"] >= accuracy or run.seconds > seconds

    return hook


def trained(options, changes, selective, seed, minutes):
    """One run, stage after stage: its row, and its curve of validation accuracy at the stages' lengths."""
    configs = settings(options, changes, selective, seed)
    whole, left = configs[-1], 60 * minutes
    shared = {"task": f"{whole.data.get('n_tokens', 16)} of {whole.seqlen}", "selective": name_of(selective)}
    torch.manual_seed(seed)
    model = partly_selective_model(MambaConfig(**{"vocab_size": 16} | whole.model), selective)
    stages, curve = [], []
    for config in configs:
        result = train(config, model=model, hooks=[ends(1 if config is whole else DONE, left)])
        before = sum(steps for _, steps in stages)
        stages.append([config.seqlen, result.step])
        left -= result.seconds
        lines = [line for line in result.metrics if "validation_accuracy" in line]
        each = -(-len(lines) // SHOWN)
        curve += [
            shared | {
                "seed": seed, "length": config.seqlen, "step": before + line["step"],
                "tokens": report.percent(line["validation_accuracy"]),
            }
            for line in lines[(len(lines) - 1) % each :: each]
        ]  # fmt: skip
        if left < 0:
            break
    right = correct(model, whole)
    row = shared | {
        "tokens": report.percent(right.mean().item()),
        "sequences": report.percent(right.all(1).double().mean().item()),
        "paper": PAPER.get(selective) if whole.seqlen == 4096 else None,
        "steps": sum(steps for _, steps in stages), "stages": stages, "batch": whole.batch_size,
        "lr": whole.lr, "minutes": minutes - left / 60, "seed": seed,
    }  # fmt: skip
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
    """A sentence a task: what each subset copies; one more where the length grew: by which steps."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        told = by_subset(mine, lambda row: f"{row['tokens']:.1f}")
        lines.append(f"{task} tokens, copied right in percent, a number a seed: {told}")
        if any(len(row["stages"]) > 1 for row in mine):
            told = by_subset(mine, lambda row: " + ".join(f"{n} at {length}" for length, n in row["stages"]))
            lines.append(f"{task} tokens, steps at growing lengths (paper: 400000 at 4096): {told}")
    return lines


def by_subset(rows, tell):
    """What `tell` says of each row, those of a subset together."""
    found = {}
    for row in rows:
        found.setdefault(row["selective"], []).append(tell(row))
    return "; ".join(f"{name}: {' / '.join(told)}" for name, told in found.items())


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
        for place, name in enumerate(names):
            for seed in sorted({row["seed"] for row in rows}):
                mine = [c for c in result["curves"]
                        if (c["task"], c["selective"], c["seed"]) == (task, name, seed)]  # fmt: skip
                draw_curve(curves, mine, colors[name], 2 + 12 * place, seed == rows[0]["seed"])
        curves.set(xlabel="training step", ylabel="tokens right (%)", ylim=(0, 103))
        if any(len(row.get("stages", [])) > 1 for row in rows):
            curves.set_title("at the length of the stage, as written for the first seed")
    return fig


def draw_curve(ax, points, color, height, mark):
    """Tokens right over steps, a line a stage; where there are several, `mark` writes their lengths there."""
    lengths = list(dict.fromkeys(c.get("length") for c in points))
    for length in lengths:
        mine = [c for c in points if c.get("length") == length]
        ax.plot([c["step"] for c in mine], [c["tokens"] for c in mine], color=color, lw=1.5)
        if mark and len(lengths) > 1:
            ax.axvline(mine[0]["step"], color=color, lw=0.8, ls=":")
            style = {"color": color, "fontsize": 8, "rotation": 90, "ha": "right", "va": "bottom"}
            ax.text(mine[0]["step"], height, f"{report.short(length)} ", **style)
