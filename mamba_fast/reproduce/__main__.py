"""Measure a result of the paper and write docs/results/NAME.json with the paper's numbers, and its figure.

With `page` for a NAME: draw the figures of all these files again, and write the tables of docs/reproduce.md.
"""

import argparse
import importlib
from pathlib import Path

import torch

from mamba_fast.bench import readme
from mamba_fast.reproduce import report
from mamba_fast.train import ConfigError

NAMES = ("counts", "induction", "copying", "figure8", "memory", "precision")
SEEDS = {"induction": [0, 1, 2]}
MINUTES = {"induction": 20.0, "copying": 60.0}  # of one training run


def main(arguments=None):
    options = parse(arguments)
    if options.name == "page":
        return page()
    module = importlib.import_module(f"mamba_fast.reproduce.{options.name}")
    name = options.name + "-quick" * options.quick
    try:
        for found in module.run(options):  # a run that is cut off keeps what it has
            path, picture = report.keep(name, module, found, options.device, options.out)
    except (ConfigError, ImportError) as error:
        raise SystemExit(str(error)) from None
    report.show(found)
    print(f"written to {path} and {picture}")


def page(results=report.RESULTS, document=report.ROOT / "docs" / "reproduce.md"):
    """The figures and the tables that the files in `results` hold."""
    for path in sorted(results.glob("*.json")):
        name = path.stem.removesuffix("-quick")
        if name in NAMES:
            report.draw(importlib.import_module(f"mamba_fast.reproduce.{name}"), path)
    print(f"{document.name}: {', '.join(readme.rewrite(document, results))}")


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m mamba_fast.reproduce", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "page"))
    parser.add_argument("--quick", action="store_true", help="a small size, for a CPU: NAME-quick.json")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the training runs")
    parser.add_argument("--minutes", type=float, help="induction, copying: a run ends after so many")
    parser.add_argument("--batch", type=int, nargs="+", help="figure8: batch sizes of the right panel")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the result")
    parser.add_argument("--work", type=Path, default=Path("out/reproduce"), help="folder of training runs")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or SEEDS.get(options.name, [0])
    options.minutes = MINUTES.get(options.name) if options.minutes is None else options.minutes
    options.batch = options.batch or ([1, 2] if options.quick else [2**k for k in range(8)])
    options.work /= "quick" if options.quick else "full"
    return options


if __name__ == "__main__":
    main()
