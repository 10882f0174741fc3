"""Induction heads: trained at length 256, tested up to 2^20 tokens, the states carried from piece to piece.

Paper: section 4.1.2, tables 2 and 11, appendix E.1: 2 layers, d_model 64, vocabulary 16, batch 8, fresh rows
at every step, Adam at a constant 1e-3, 204,800 steps.
"""

import time

import torch
from tqdm import tqdm

from mamba_fast.reproduce import report
from mamba_fast.train import induction_heads, load_config, train

TITLE = "Induction heads: accuracy over length"
LENGTHS = [2**k for k in range(6, 21)]
PAPER = {  # accuracy in percent; Mamba is at 100 at every length of LENGTHS
    "attention, absolute positions": {256: 100, 512: 58.6, 1024: 26.6},
    "attention, RoPE": {256: 100, 512: 83.6, 1024: 31.3},
    "attention, xPos": {256: 100, 512: 99.6, 1024: 67.6, 2048: 25.4},
    "H3": {256: 100, 512: 80.9, 1024: 39.5, 2**20: 7.4},
    "Hyena": {256: 100, 512: 100, 1024: 44.1, 2**20: 9.8},
}
QUICK = {
    "seqlen": 64, "batch_size": 16, "model.d_model": 32, "lr": 4e-3,
    "steps": 2000, "log_every": 50, "eval_every": 50, "graph": False,
}  # fmt: skip
TOKENS = {"cuda": 2**20, "cpu": 2**15}  # in one call of the model
SHOWN = 32  # lines of a run that are kept


def run(options):
    """Train once a seed; rows {"length", "paper", "seed 0", ...} in percent of the tested sequences.

    "seconds" is the time of the tests of a length, of all seeds.
    """
    lengths = [2**k for k in range(5, 14)] if options.quick else LENGTHS
    config = settings(options, options.seeds[0])
    facts = {"trained at": config.seqlen, "batch": config.batch_size, "lr": config.lr}
    rows, runs, history = [{"length": n, "sequences": rows_at(n, options.quick)} for n in lengths], [], []
    for row in rows:
        row["paper"] = None if options.quick else 100
    for seed in options.seeds:
        result, lines = trained(options, seed)
        for row in tqdm(rows, desc=f"test seed {seed}", leave=False):
            start = time.perf_counter()
            right = accuracy(result.model, row["length"], row["sequences"], 2 + seed)
            row[f"seed {seed}"] = report.percent(right)
            row["seconds"] = row.get("seconds", 0) + time.perf_counter() - start
        reached = [line["seconds"] for line in lines if line["validation_accuracy"] == 1]
        runs.append({
            "seed": seed, "parameters": sum(p.numel() for p in result.model.parameters()),
            "steps": result.step, "minutes": result.seconds / 60,
            "minutes to 100 %": reached[0] / 60 if reached else None,
            "lowest accuracy": min(row[f"seed {seed}"] for row in rows),
        })  # fmt: skip
        kept = lines[:: -(-len(lines) // SHOWN)]
        history += [
            {"seed": seed, "minutes": x["seconds"] / 60, "accuracy": report.percent(x["validation_accuracy"])}
            for x in kept
        ]
        told = {"findings": findings(rows, runs), "rows": rows, "runs": runs, "history": history}
        yield facts | {"seeds": len(runs)} | told


def settings(options, seed):
    """The :class:`TrainConfig` of a run."""
    device = options.device
    changes = {
        "out": str(options.work / f"induction-{seed}"), "seed": seed, "device": device.type,
        "graph": device.type == "cuda",
    }  # fmt: skip
    return load_config("induction", changes | (QUICK if options.quick else {}))


def trained(options, seed, until=()):
    """A run and the lines of its metrics that hold an accuracy.

    It takes all its steps, or its time: when it is right at the training length, and far beyond, what it does
    at 2^20 tokens takes most of the steps still. `until`: it ends when a few rows of each of these lengths
    are right.
    """

    def hook(run, line):
        if until and line["validation_accuracy"] == 1:
            line["probe"] = min(accuracy(run.model, n, 8, 1) for n in until)
        return line.get("probe") == 1 or line["seconds"] > 60 * options.minutes

    result = train(settings(options, seed), hooks=[hook])
    return result, [line for line in result.metrics if "validation_accuracy" in line]


def rows_at(seqlen, quick):
    """How many sequences are tested at a length."""
    return max(16, min(32 if quick else 256, 2**22 // seqlen))


@torch.no_grad()
def accuracy(model, seqlen, rows, seed):
    """The fraction of `rows` sequences of `seqlen` tokens at whose end the model recalls the right token.

    A call of the model reads a piece of the sequences and hands its states to the next one, so that the
    memory it takes does not grow with the length.
    """
    weight = model.lm_head.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    tokens = TOKENS[weight.device.type]
    each, right = max(1, min(rows, tokens // seqlen)), 0
    for first in range(0, rows, each):
        count = min(each, rows - first)
        batch = induction_heads(
            count, seqlen, model.config.vocab_size, generator=generator, device=weight.device
        )
        pieces = batch.input_ids.split(tokens // each, dim=1)
        states = {"return_final_states": True} if len(pieces) > 1 else {}
        for piece in pieces:
            out = model(piece, num_last_tokens=1, **states)
            if states:
                states["initial_states"] = out.final_states
        right += (out.logits[:, -1].argmax(-1) == batch.labels[:, -1]).sum().item()
    return right / rows


def findings(rows, runs):
    """How many seeds are at 100 % at every length, and how long it took."""
    whole = [r for r in runs if r["lowest accuracy"] == 100]
    last = rows[-1]["length"]
    lines = [f"{len(whole)} of {len(runs)} seeds: 100 % at every length up to {last} tokens"]
    times = [r["minutes to 100 %"] for r in runs]
    if all(times):
        lines.append(f"100 % at the training length after {min(times):.2f} to {max(times):.2f} minutes")
    return lines


def figure(plt, result):
    """Accuracy over length beside the paper's other models, and over the minutes of training."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[1.6, 1])
    lengths = [row["length"] for row in result["rows"]]
    seeds = [name for name in result["rows"][0] if name.startswith("seed")]
    if result["rows"][0]["paper"]:
        axes[0].plot(lengths, [row["paper"] for row in result["rows"]], "o", ms=10, mfc="none",
                     color=report.PAPER, label="paper: Mamba")  # fmt: skip
        for (name, points), color in zip(PAPER.items(), report.OTHERS, strict=False):
            axes[0].plot(*zip(*points.items(), strict=True), "x:", color=color, label=f"paper: {name}", lw=1)
    for k, name in enumerate(seeds):
        axes[0].plot(lengths, [row[name] for row in result["rows"]], "o-", ms=4, color=report.OURS,
                     label=f"ours, {len(seeds)} seeds" if k == 0 else None)  # fmt: skip
    axes[0].axvline(result["trained at"], color="0.6", lw=1)
    axes[0].text(result["trained at"], 3, " training length", color="0.4", fontsize=8)
    report.lengths_axis(axes[0], lengths)
    axes[0].set(xlabel="length (tokens)", ylabel="right at the last token (%)", ylim=(0, 105))
    axes[0].legend(fontsize=8, loc="center right")
    for seed in {row["seed"] for row in result["history"]}:
        mine = [row for row in result["history"] if row["seed"] == seed]
        axes[1].plot([r["minutes"] for r in mine], [r["accuracy"] for r in mine], color=report.OURS)
    axes[1].set(xlabel="minutes of training", ylabel="validation, training length (%)", ylim=(0, 105))
    return fig
