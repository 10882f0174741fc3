"""Rows of calls that take turns: their time, tokens a second, peak memory; as a table and in sentences."""

import torch

from mamba_fast.bench.case import type_name
from mamba_fast.bench.timing import in_turn, peak_bytes


def measured(case, shape, dtype, calls, device, memory=True):
    """One row for each of `calls` by name, which take turns; the published and other models are peers.

    memory: on a GPU also the peak of each call.
    """
    memory = memory and device.type == "cuda"
    peaks = {name: peak_bytes(call) for name, call in calls.items()} if memory else {}
    times = in_turn(calls, device)
    tokens = torch.Size(shape).numel()
    row = {"case": case, "shape": shape, "dtype": type_name(dtype)}
    return [
        row
        | {"name": name, "role": "ours" if name.startswith("ours") else "peer", "time": time}
        | {"tokens_per_s": 1e3 * tokens / time["median"]}
        | ({"peak_bytes": peaks[name]} if name in peaks else {})
        for name, time in times.items()
    ]


def table(rows):
    """Milliseconds, spread, times the first of ours, tokens a second, peak memory."""
    lead = leads(rows)
    wide = max(len(row["name"]) for row in rows) + 2
    lines = [f"{'case':<24}{'':<{wide}}{'ms':>10}{'spread':>8}{'/ours':>8}{'tokens/s':>11}{'peak GB':>9}"]
    for row in rows:
        time = row["time"]
        spread = 100 * (time["p90"] - time["p10"]) / time["median"]
        ratio = time["median"] / lead[row["case"]]["time"]["median"]
        peak = f"{row['peak_bytes'] / 1e9:9.2f}" if "peak_bytes" in row else ""
        numbers = f"{time['median']:10.2f}{spread:7.1f}%{ratio:7.2f}x{row['tokens_per_s']:11.0f}{peak}"
        lines.append(f"{row['case']:<24}{row['name']:<{wide}}{numbers}")
    return "\n".join(lines)


def leads(rows):
    """The first row of ours of every case."""
    found = {}
    for row in rows:
        if row["role"] == "ours":
            found.setdefault(row["case"], row)
    return found


def findings(rows):
    """For every row of ours its speed, and memory, against the fastest of its peers."""
    lines = []
    for row in rows:
        peers = [r for r in rows if r["case"] == row["case"] and r["role"] == "peer"]
        if row["role"] == "ours" and peers:
            best = min(peers, key=lambda r: r["time"]["median"])
            ratio = best["time"]["median"] / row["time"]["median"]
            line = f"{row['case']}, {row['name']}: {ratio:.2f}x the speed of {best['name']}"
            if "peak_bytes" in row:
                line += f", {row['peak_bytes'] / best['peak_bytes']:.2f}x its peak memory"
            lines.append(line)
    return lines
