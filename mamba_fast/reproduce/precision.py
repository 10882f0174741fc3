"""Parameters in half precision: what is lost of the recurrence, and what mixed precision (AMP) keeps.

A and Δ act through exp(Δ A), over and over. A parameter in a half type can neither hold them exactly nor
take the small steps of an optimizer: a step below half the distance to the next number is no step at all.
The paper trains with AMP, parameters in float32 (appendix E.2); it has no numbers for the others.
"""

import torch
from torch.nn import functional as F

from mamba_fast.config import MambaConfig
from mamba_fast.model import MambaLMHeadModel
from mamba_fast.reproduce import report
from mamba_fast.train import load_config, train

TITLE = "Precision of the parameters: the same seeds, data and steps"
WAYS = {  # name: type of the parameters, type of autocast
    "float32": (torch.float32, "float32"),
    "float32, AMP bfloat16": (torch.float32, "bfloat16"),
    "float32, AMP float16": (torch.float32, "float16"),
    "bfloat16": (torch.bfloat16, "float32"),
    "float16": (torch.float16, "float32"),
}
RECURRENCE = ("A_log", "dt_proj.bias")  # what A and the steps Δ are made of
TASK = {"seqlen": 32, "batch_size": 16, "model.d_model": 32, "lr": 1e-3, "steps": 1500, "graph": False}
QUICK = {"steps": 40}
SHOWN = 30  # points of a curve


def run(options):
    """Rows, one for a way and a seed: the loss at the end, and what became of the recurrence, in percent.

    "stuck": entries of A_log and of the bias of Δ that no step has moved. "rounded": the largest relative
    error of a horizon 1 / (Δ |A|) by rounding the initial parameters alone. "finite": are all of them?
    """
    rows, curves = [], []
    for seed in options.seeds:
        for way, (dtype, autocast) in WAYS.items():
            row, curve = trained(options, seed, way, dtype, autocast)
            rows.append(row)
            curves += curve
        yield {"findings": findings(rows), "rows": rows, "curves": curves}


def trained(options, seed, way, dtype, autocast):
    """One run: its row, and its losses."""
    folder = options.work / f"precision-{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    every = {"log_every": 10, "eval_every": 0, "save_every": 10**6}
    changes = {"out": str(folder), "seed": seed, "device": options.device.type, "dtype": autocast}
    config = load_config("induction", TASK | every | (QUICK if options.quick else {}) | changes)
    torch.manual_seed(seed)
    exact = MambaLMHeadModel(MambaConfig(**{"vocab_size": 16} | config.model))
    before = recurrence(exact)
    model = exact.to(dtype)
    error = horizon_error(before, recurrence(model))
    start = recurrence(model)
    result = train(config, model=model)
    stuck = {
        name: torch.cat([(a == b).flatten() for a, b in zip(start[name], after, strict=True)])
        for name, after in recurrence(result.model).items()
    }
    losses = [line["loss"] for line in result.metrics]
    finite = all(bool(torch.isfinite(p).all()) for p in result.model.parameters())
    part = {n: report.percent(v.double().mean().item()) if finite else None for n, v in stuck.items()}
    row = {
        "parameters": way, "seed": seed, "steps": result.step, "loss": losses[-1], "finite": finite,
        "A_log stuck": part["A_log"], "Δ bias stuck": part["dt_proj.bias"], "horizon rounded": 100 * error,
    }  # fmt: skip
    kept = result.metrics[:: -(-len(result.metrics) // SHOWN)]
    return row, [{"parameters": way, "seed": seed, "step": x["step"], "loss": x["loss"]} for x in kept]


def recurrence(model):
    """{name: its tensors in all layers}, copies in float32, of what A and Δ are made of."""
    return {
        name: [
            layer.mixer.get_parameter(name).detach().float().cpu().clone() for layer in model.backbone.layers
        ]
        for name in RECURRENCE
    }


def horizon_error(exact, rounded):
    """The largest relative error of Δ |A| at Δ = softplus(bias), over layers, channels and states."""
    worst = 0.0
    for A_log, bias, near_A_log, near_bias in zip(*exact.values(), *rounded.values(), strict=True):
        want, got = (
            F.softplus(b.double())[:, None] * a.double().exp()
            for a, b in ((A_log, bias), (near_A_log, near_bias))
        )
        worst = max(worst, ((got - want).abs() / want).max().item())
    return worst


def findings(rows):
    """What was kept and what was lost, a sentence a way."""
    lines = []
    for way in dict.fromkeys(row["parameters"] for row in rows):
        mine = [row for row in rows if row["parameters"] == way]
        found = "NaN after training"
        if all(row["finite"] for row in mine):
            losses, stuck = ([row[name] for row in mine] for name in ("loss", "A_log stuck"))
            found = f"loss {min(losses):.3g} to {max(losses):.3g}; {max(stuck)} % of A_log never moved"
        rounded = max(row["horizon rounded"] for row in mine)
        lines.append(f"{way}: {found}; horizons rounded by up to {rounded:.2g} %")
    return lines


def figure(plt, result):
    """Loss over steps, and the parts of A_log and of the bias of Δ that never moved."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=[1.5, 1, 1])
    colors = dict(zip(WAYS, [report.OURS, *report.OTHERS], strict=False))
    for way, color in colors.items():
        for seed in {c["seed"] for c in result["curves"]}:
            mine = [c for c in result["curves"] if (c["parameters"], c["seed"]) == (way, seed)]
            first = seed == result["rows"][0]["seed"]
            axes[0].plot([c["step"] for c in mine], [c["loss"] for c in mine], color=color, lw=1.3,
                         label=way if first else None)  # fmt: skip
    axes[0].set(xlabel="training step", ylabel="loss (nats)", yscale="log")
    axes[0].legend(fontsize=8)
    for ax, name, what in (
        (axes[1], "A_log stuck", "A_log: entries that never moved (%)"),
        (axes[2], "horizon rounded", "error of 1/(Δ|A|) by rounding (%)"),
    ):
        for place, (way, color) in enumerate(colors.items()):
            for row in result["rows"]:
                if row["parameters"] == way and row[name] is not None:
                    ax.barh(place, row[name], 0.7, color=color)
                elif row["parameters"] == way:
                    ax.text(0, place, " NaN after training", va="center", fontsize=9)
        ax.set_yticks(range(len(WAYS)), WAYS if ax is axes[1] else [])
        ax.set(ylim=(len(WAYS) - 0.5, -0.5), xlabel=what)
    return fig
