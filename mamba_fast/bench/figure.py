"""One figure for every result, drawn from its JSON alone. A kernel has one colour in all of them."""

import hashlib
import json
import math
from pathlib import Path

COLORS = {
    "cuda": "#009E73",
    "triton": "#0072B2",
    "mamba_inner_fn": "#009E73",
    "numba": "#0072B2",
    "torch": "#56B4E9",
    "published": "#D55E00",
    "SDPA flash": "#CC79A7",
    "SDPA cuDNN": "#882255",
    "op by op": "#56B4E9",
    "compiled higher-order scan": "#E69F00",
    "loop in PyTorch": "#882255",
    "mamba_fast": "#009E73",
    "ours": "#009E73",
    "ours, all logits": "#56B4E9",
    "seq_idx": "#E69F00",
    "cu_seqlens": "#CC79A7",
    "deterministic": "#882255",
    "transformers": "#CC79A7",
    "mamba.py": "#E69F00",
}
LIMIT = "#000000"
TITLES = {
    "scan": "Selective scan: time over the limit of the machine",
    "conv": "Causal convolution: time over the limit of the machine",
    "update": "Selective state update: time over the limit of the machine",
    "norm": "Residual sum and norm: time over the limit of the machine",
    "inner": "The block as one op: time over the limit of the scan and of memory",
    "attention": "Forward pass, width 1024, batch 1",
    "scan-grid": "Selective scan over shapes",
    "scan-options": "Selective scan with options: time over the limit of the machine",
    "generation": "Generation: a token of every row over the bytes it must move, and tokens a second",
    "model": "Forward pass and training step",
}


def draw(result, path):
    """Write the figure of `result` (as in its JSON file) to `path`."""
    import matplotlib.pyplot as plt

    kinds = {"attention": _lengths, "scan-grid": _grid, "model": _bars, "generation": _generation}
    style = Path(__file__).parents[2] / "notebooks" / "style.mplstyle"
    with plt.style.context(style if style.exists() else "default"):
        figure = kinds.get(result["bench"], _limits)(plt, result)
        title = f"{TITLES[result['bench']]}. {result['device']}, {result['date']}"
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
        figure.savefig(path, metadata={"Source": source(result)})
        plt.close(figure)


def source(result):
    """What a figure says of the result it was drawn from, in its PNG file: a digest of the result."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _limits(plt, result):
    """A line a case, a dot a kernel: how many times the limit it takes."""
    rows = result["rows"]
    directions = [d for d in ("forward", "backward") if any(d in row for row in rows)]
    types = {row["dtype"] for row in rows}
    cases = list(dict.fromkeys(_label(row, types) for row in rows))
    size = (5.2 * len(directions) + 1.6, 1.5 + 0.3 * len(cases))
    figure, axes = plt.subplots(1, len(directions), figsize=size, sharey=True, squeeze=False)
    for ax, direction in zip(axes[0], directions, strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            mine = [row for row in rows if row["name"] == name and direction in row]
            times = [row[direction]["median"] / row[f"{direction}_limit"] for row in mine]
            places = [cases.index(_label(row, types)) for row in mine]
            ax.plot(times, places, "o", color=COLORS[name], label=name, ms=6)
        ax.axvline(1, color=LIMIT, lw=1.2)
        _log_axis(ax, "x")
        ax.set(xlabel="time / limit", title=f"{direction} (the black line is the limit)")
    axes[0, 0].set_yticks(range(len(cases)), cases)
    axes[0, 0].set_ylim(len(cases) - 0.5, -0.5)
    _legend(figure, axes[0, 0])
    return figure


def _generation(plt, result):
    """A line a case: how many times its byte limit a token takes, and how many tokens come in a second."""
    rows = result["rows"]
    labels = ["{}, batch {}, {} + {}".format(row["case"], *row["shape"]) for row in rows]
    cases = list(dict.fromkeys(labels))
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.7 + 0.3 * len(cases)), sharey=True)
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [
            (row, cases.index(label)) for row, label in zip(rows, labels, strict=True) if row["name"] == name
        ]
        places = [place for _, place in mine]
        style = {"color": COLORS[name], "label": name, "ms": 6}
        axes[0].plot([row["token"] / row["token_limit"] for row, _ in mine], places, "o", **style)
        axes[1].plot([row["tokens_per_s"] for row, _ in mine], places, "o", **style)
    axes[0].axvline(1, color=LIMIT, lw=1.2)
    axes[0].set(xlabel="time of a token / limit", title="behind the prompt (the black line is the limit)")
    axes[1].set(xlabel="tokens per second", title="new tokens over all of the time")
    for ax in axes:
        _log_axis(ax, "x")
    axes[0].set_yticks(range(len(cases)), cases)
    axes[0].set_ylim(len(cases) - 0.5, -0.5)
    _legend(figure, axes[0])
    return figure


def _label(row, types):
    return row["case"] if len(types) == 1 else f"{row['case']}, {row['dtype']}"


def _legend(figure, ax):
    handles, names = ax.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))


def _lengths(plt, result):
    """Time over length, a curve a kernel, named at its end."""
    figure, ax = plt.subplots(figsize=(7.6, 4.4))
    ends = []
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        points = [
            (row["shape"][2], row["forward"]["median"]) for row in result["rows"] if row["name"] == name
        ]
        ax.plot(*zip(*points, strict=True), "o-", color=COLORS[name], ms=4)
        ends.append((points[-1], name))
    _name_ends(ax, ends)
    ax.set(xlabel="length L (tokens)", ylabel="time (ms)")
    _log_axis(ax, "x", 2)
    _log_axis(ax, "y")
    return figure


def _bars(plt, result):
    """A group a case, a bar a model: its time, and on a GPU its peak memory, of the slowest or largest."""
    rows = result["rows"]
    cases, names = (list(dict.fromkeys(row[k] for row in rows)) for k in ("case", "name"))
    parts = [("time", "ms", rows, lambda row: row["time"]["median"], "{:.3g}")]
    if measured := [row for row in rows if "peak_bytes" in row]:  # not where a case is one graph
        parts.append(("peak memory", "GB", measured, lambda row: row["peak_bytes"] / 1e9, "{:.1f}"))
    size = (5.2 * len(parts) + 1.6, 1.2 + 0.3 * len(rows))
    figure, axes = plt.subplots(1, len(parts), figsize=size, sharey=True, squeeze=False)
    for ax, (what, unit, shown, value, form) in zip(axes[0], parts, strict=True):
        most = {row["case"]: max(value(r) for r in shown if r["case"] == row["case"]) for row in shown}
        for i, name in enumerate(names):
            mine = [row for row in shown if row["name"] == name]
            places = [cases.index(row["case"]) + 0.8 * ((i + 0.5) / len(names) - 0.5) for row in mine]
            shares = [value(row) / most[row["case"]] for row in mine]
            bars = ax.barh(places, shares, 0.8 / len(names), color=COLORS[name], label=name)
            ax.bar_label(bars, [form.format(value(row)) for row in mine], padding=3, fontsize=8)
        ax.set(xlabel=f"{what} / the most of the case (the numbers: {unit})", xlim=(0, 1.15))
    axes[0, 0].set_yticks(range(len(cases)), cases)
    axes[0, 0].set_ylim(len(cases) - 0.5, -0.5)
    _legend(figure, axes[0, 0])
    return figure


def _log_axis(ax, which, base=10):
    """A logarithmic axis whose ticks are written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    getattr(ax, f"set_{which}scale")("log", base=base)
    axis = getattr(ax, f"{which}axis")
    low, high = getattr(ax, f"get_{which}lim")()
    few = base == 10 and high < 300 * low
    axis.set_major_locator(LogLocator(base, subs=(1, 2, 5) if few else (1,), numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: _tokens(value) if base == 2 else f"{value:g}")


def _tokens(value):
    """512, 2k (2048), 1M."""
    power = 0 if value < 2**10 else 1 if value < 2**20 else 2
    return f"{value / 1024**power:g}{('', 'k', 'M')[power]}"


def _name_ends(ax, ends, apart=1.45):
    """Names beside the last points of curves on a logarithmic axis, kept `apart` by that factor."""
    floor = 0
    for (x, y), name in sorted(ends, key=lambda end: end[0][1]):
        floor = max(y, floor * apart)
        offset = 28 * math.log(floor / y)
        at = {"xytext": (8, offset), "textcoords": "offset points"}
        text = name if name.startswith("SDPA") else f"scan, {name}"
        ax.annotate(text, (x, y), **at, color=COLORS[name], va="center", annotation_clip=False)
    ax.margins(x=0.05)


def _grid(plt, result):
    """Ratio to the published kernel, where it was timed, by size; time of an element by length."""
    from mamba_fast.bench.scan_grid import along_length, nanoseconds, ratios

    rows = result["rows"]
    directions = ("forward", "backward") if any(row["role"] == "peer" for row in rows) else ()
    widths = [1] * len(directions) + [1.3]
    figure, axes = plt.subplots(
        1, len(widths), figsize=(4 * sum(widths), 3.8), width_ratios=widths, squeeze=False
    )
    *scatters, curves = axes[0]
    lead = next(row["name"] for row in rows if row["role"] == "ours")
    for ax, direction in zip(scatters, directions, strict=True):
        ax.plot(*zip(*ratios(rows, direction), strict=True), "o", color=COLORS[lead], ms=4, alpha=0.7)
        ax.axhline(1, color=COLORS["published"], lw=1.2)
        ax.set(xscale="log", xlabel="batch x d_inner x length")
        ax.set_title(f"{direction}: published time / {lead}'s")
        ax.set_ylim(bottom=0)
    for name in dict.fromkeys(row["name"] for row in rows):
        for direction, line in (("forward", "o-"), ("backward", "o--")):
            mine = along_length(rows, name)
            times = [1e3 * nanoseconds(row, direction) for row in mine]
            lengths = [row["shape"][2] for row in mine]
            curves.plot(lengths, times, line, color=COLORS[name], ms=3, label=f"{name} {direction}")
    curves.set(ylabel="time per element (ps)", xlabel="length L (tokens)", title="batch 1, d_inner 1536")
    _log_axis(curves, "x", 2)
    _log_axis(curves, "y")
    _legend(figure, curves)
    return figure
