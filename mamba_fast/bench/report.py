"""A result as a table to print and as a file to keep."""

import datetime
import json
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mamba_fast.bench import figure

PACKAGES = ("triton", "numba", "mamba_ssm", "causal_conv1d")
DIRECTIONS = ("forward", "backward")
WIDE = 33  # characters of the table for each of them


def machine(device):
    """Device, date, versions and commit, so that a number can be traced."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu {torch.get_num_threads()} threads",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        **{name: _version(name) for name in PACKAGES},
    }


def keep(result, out=None, picture=None):
    """Write `result`, by default to docs/results/NAME-DEVICE.json, and its figure beside it: both paths."""
    slug = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    out = out or Path("docs/results") / f"{result['bench']}-{slug}.json"
    write(result, out)
    picture = picture or out.with_suffix(".png")
    figure.draw(result, picture)
    return out, picture


def write(result, path):
    """One line of JSON for a fact and one for a row, four digits a number."""
    facts = {k: v for k, v in result.items() if k != "rows"}
    lines = [f" {json.dumps(k)}: {json.dumps(rounded(v))}," for k, v in facts.items()]
    rows = [f"  {json.dumps(rounded(row))}" for row in result["rows"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["{", *lines, ' "rows": [', ",\n".join(rows), " ]", "}"]) + "\n")


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def leads(rows):
    """The row that ratios refer to, by case and type: the first kernel of ours, or the first of all."""
    found = {}
    for row in sorted(rows, key=lambda row: row["role"] != "ours"):
        found.setdefault((row["case"], row["dtype"]), row)
    return found


def table(rows):
    """Milliseconds and spread, times the limit, times the first kernel of ours; then the host's time."""
    lead, seen, wide = leads(rows), set(), max(len(r["name"]) for r in rows) + 1
    head = f"{'ms':>11}{'spread':>7}{'/limit':>8}{'/ours':>7}"
    names = f"{'case':<21}{'type':<9}{'kernel':<{wide}}"
    lines = [
        f"{'':<{len(names)}}{'forward':>{len(head)}}{'backward':>{len(head)}}{'host us':>15}",
        f"{names}{head}{head}{'fwd':>8}{'bwd':>7}",
    ]
    for row in rows:
        key = (row["case"], row["dtype"])
        start = f"{row['case']:<21}{row['dtype']:<9}"
        if key not in seen and "forward_limit" in row:
            limit = [_limit_cells(row, lead[key], d) for d in DIRECTIONS]
            lines.append(f"{start}{'limit':<{wide}}{''.join(limit)}".rstrip())
        seen.add(key)
        cells = "".join(_cells(row, lead[key], d) for d in DIRECTIONS)
        host = [row.get(f"{d}_host") for d in DIRECTIONS]
        host = "".join(f"{1e3 * h:{w}.0f}" if h else "" for h, w in zip(host, (8, 7), strict=True))
        lines.append(f"{start}{row['name']:<{wide}}{cells}{host}".rstrip())
    return "\n".join(lines)


def _cells(row, lead, direction):
    if direction not in row:
        return " " * WIDE
    time = row[direction]
    spread = 100 * (time["p90"] - time["p10"]) / time["median"]
    limit = row.get(f"{direction}_limit")
    over = f"{time['median'] / limit:8.2f}" if limit else " " * 8
    ratio = f"{time['median'] / lead[direction]['median']:6.2f}x" if direction in lead else " " * 7
    return f"{time['median']:11.4f}{spread:6.1f}%{over}{ratio}"


def _limit_cells(row, lead, direction):
    limit = row.get(f"{direction}_limit")
    if limit is None or direction not in lead:
        return " " * WIDE
    return f"{limit:11.4f}{'':7}{1:8.2f}{limit / lead[direction]['median']:6.2f}x"


def against_peer(rows):
    """Sentences for every kernel of ours: the published time over its time, its error over that one's."""
    peers = {(r["case"], r["dtype"]): r for r in rows if r["name"] == "published"}
    lines = []
    for name in dict.fromkeys(r["name"] for r in rows if r["role"] == "ours"):
        mine = [r for r in rows if r["name"] == name]
        pairs = [(r, peers[at]) for r in mine if (at := (r["case"], r["dtype"])) in peers]
        for parts in (("forward",), ("backward",), ("forward_training", "backward")):
            both = [(r, peer) for r, peer in pairs if all(p in r and p in peer for p in parts)]
            ratios = [(_sum(p, parts) / _sum(r, parts), f"{r['case']} {r['dtype']}") for r, p in both]
            if ratios:
                (low, worst), (high, best) = min(ratios), max(ratios)
                what, reach = " + ".join(parts), f"{low:.2f}x ({worst}) to {high:.2f}x ({best})"
                lines.append(f"{name} {what}: {reach} the published speed")
        errors = [
            (error / peer["errors"][tensor], f"{tensor}, {r['case']} {r['dtype']}")
            for r, peer in pairs
            for tensor, error in r["errors"].items()
            if peer["errors"][tensor] > 0
        ]
        if errors:
            most, where = max(errors)
            lines.append(f"{name}: error up to {most:.2f}x the published kernel's ({where})")
    return lines


def _sum(row, parts):
    return sum(row[part]["median"] for part in parts)


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)
