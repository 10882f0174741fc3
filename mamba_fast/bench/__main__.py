"""Check, time, print a table, write docs/results/NAME-DEVICE.json and draw its figure beside it.

With readme for a NAME: write the tables of README.md again from those files.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from mamba_fast.bench import generation, readme, report
from mamba_fast.bench.checks import CheckFailed
from mamba_fast.bench.measure import run

NAMES = ("scan", "attention", "conv", "update", "norm", "inner", "model")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["generation"]:  # whose flags are those of the published script
        return generation.main(arguments[1:])
    options = parse(arguments)
    if options.name == "readme":
        return readme.main()
    name = f"{options.name}-{options.kind}" if options.kind else options.name
    bench = importlib.import_module(f"mamba_fast.bench.{name.replace('-', '_')}")
    device = torch.device(options.device)
    try:
        speeds, rows = run(bench.cases(device, options.peer, options.backend), device)
    except CheckFailed as error:
        sys.exit(f"{error}: nothing is written")
    if hasattr(bench, "whole"):
        rows += bench.whole(device, options.peer, options.backend)
    facts = report.machine(device)
    findings = getattr(bench, "findings", report.against_peer)(rows)
    result = {"bench": name} | facts | speeds | {"checks": "passed", "findings": findings, "rows": rows}
    result = report.rounded(result)
    out, picture = report.keep(result, options.out, options.figure)
    print(getattr(bench, "table", report.table)(result["rows"]))
    print(*findings, sep="\n")
    print(f"{facts['device']}, {facts['date']}, torch {facts['torch']}; a copy moves", end=" ")
    print(f"{speeds['copy_bytes_per_s'] / 1e9:.0f} GB/s; checks passed; written to {out} and {picture}")


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m mamba_fast.bench", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "generation", "readme"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer", action="store_true", help="time the published kernel too, on a GPU")
    parser.add_argument("--backend", help="time this backend of ours alone")
    kinds = parser.add_mutually_exclusive_group()
    described = (
        ("grid", "many shapes and lengths, not the table's"),
        ("options", "what packed rows and sums in one order cost"),
    )
    for kind, what in described:
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=f"scan: {what}")
    parser.add_argument("--out", type=Path, help="default: docs/results/NAME-DEVICE.json")
    parser.add_argument("--figure", type=Path, help="default: beside the JSON file")
    options = parser.parse_args(arguments)
    if options.kind and options.name != "scan":
        parser.error(f"--{options.kind}: of scan alone, got {options.name}")
    return options


if __name__ == "__main__":
    main()
