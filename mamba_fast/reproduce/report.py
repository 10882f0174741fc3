"""A result of the paper as a file and a figure: what all of them share."""

import json
import re
from pathlib import Path

from mamba_fast.bench import readme
from mamba_fast.bench.figure import source
from mamba_fast.bench.report import machine, write

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
if not RESULTS.is_dir():  # the package is installed, and this is no checkout: here, and not beside packages
    RESULTS = Path("docs", "results")
OURS, PAPER = "#009E73", "#D55E00"  # in every figure: what was measured here, and the paper's numbers
OTHERS = ("#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#000000")


def keep(name, module, found, device, folder):
    """Write `found` with device, date and versions to folder/NAME.json, and draw its figure: both paths."""
    path = folder / f"{name}.json"
    write({"result": name} | machine(device) | found, path)
    return path, draw(module, path)


def draw(module, path):
    """The figure beside the file of a result, drawn from that file alone."""
    import matplotlib.pyplot as plt

    result, picture = json.loads(path.read_text("utf-8")), path.with_suffix(".png")
    style = ROOT / "notebooks" / "style.mplstyle"
    with plt.style.context(style if style.exists() else "default"):
        figure = module.figure(plt, result)
        title = f"{module.TITLE}. {result['device']}, {result['date']}"
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
        figure.savefig(picture, metadata={"Source": source(result)})
        plt.close(figure)
    return picture


def show(result):
    """Print the rows of a result and its findings."""
    print(re.sub(r"(?m)^\|(-+\|)+\n", "", readme.table(result["rows"])))
    print(*result["findings"], sep="\n")


def percent(fraction):
    """0.9876 as 98.8."""
    return round(100 * fraction, 1)


def lengths_axis(ax, lengths):
    """Lengths or batch sizes, powers of two, along x."""
    ax.set_xscale("log", base=2)
    ticks = sorted(set(lengths))
    ax.set_xticks(ticks[:: -(-len(ticks) // 8)])
    ax.xaxis.set_major_formatter(lambda value, _: short(value))


def short(value):
    """512, 2k (2048), 1M."""
    power = 0 if value < 2**10 else 1 if value < 2**20 else 2
    return f"{value / 1024**power:g}{('', 'k', 'M')[power]}"
