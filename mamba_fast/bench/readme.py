"""Tables of committed results, in README.md between `<!-- NAME -->` and `<!-- /NAME -->`.

``python -m mamba_fast.bench readme`` writes them again from docs/results/NAME.json, for each NAME that has
such a file, and draws the figures beside these files again.
"""

import json
import re
from pathlib import Path

from mamba_fast.bench import figure
from mamba_fast.bench.report import leads

# What a case's label says of its shape; elsewhere it has all of it.
AXES = {
    "scan": ("batch", "d_inner", "length"),
    "generation": ("batch", "prompt", "new tokens"),
    "model": ("batch", "length"),
}
BRACKETS = "Times in ms; in brackets, that kernel's time over ours."
TIMES = ("forward", "backward", "forward_backward", "time", "total", "prompt")  # ms; those that a table has
OTHERS = {"token": "a token", "tokens_per_s": "tokens/s", "peak_bytes": "peak, GB"}


def rewrite(page, results):
    """Fill every table of the Markdown file `page` from the folder `results`; the names that were filled."""
    found = []

    def fill(match):
        file = results / f"{match[1]}.json"
        if not file.exists():
            return match[0]
        found.append(match[1])
        rows = json.loads(file.read_text("utf-8"))["rows"]
        below = f"\n\n{BRACKETS}" if timed(rows) else ""
        return f"<!-- {match[1]} -->\n{table(rows, match[1].split('-')[0])}{below}\n<!-- /{match[1]} -->"

    text = page.read_text("utf-8")
    page.write_text(re.sub(r"(?s)<!-- ([\w.-]+) -->\n.*?<!-- /\1 -->", fill, text), "utf-8")
    return found


def main():
    root = Path(__file__).parents[2]
    results = root / "docs" / "results"
    names = rewrite(root / "README.md", results)
    print(f"README.md: {', '.join(names)}")
    print(f"figures: {', '.join(redraw(results))}")


def redraw(results):
    """Draw the figure of every result of a bench in the folder `results`; their names."""
    found = []
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text("utf-8"))
        if result.get("bench") in figure.TITLES:
            figure.draw(result, file.with_suffix(".png"))
            found.append(file.stem)
    return found


def table(rows, bench=None):
    """Rows of a result as a Markdown table: times of a kernel bench, or the columns that the rows have."""
    if not timed(rows):
        names = list(dict.fromkeys(name for row in rows for name in row))
        return markdown(names, [[shown(row.get(name)) for name in names] for row in rows])
    columns = {name for row in rows for name in row}
    kinds, others = ([kind for kind in names if kind in columns] for names in (TIMES, OTHERS))
    axes = AXES.get(bench)
    lead = leads([{"role": None} | row | {"case": _label(row)} for row in rows])
    head = [f"case ({', '.join(axes or ('shape',))})", "type", "kernel"]
    head += [*(kind.replace("_", " + ") for kind in kinds), *(OTHERS[name] for name in others)]
    lines = []
    for row in rows:
        first, label = lead[_label(row), row["dtype"]], _label(row, len(axes) if axes else None)
        row = row | {"peak_bytes": f"{row['peak_bytes'] / 1e9:.2f}"} if "peak_bytes" in row else row
        numbers = [*(_time(row, first, kind) for kind in kinds), *(shown(row.get(name)) for name in others)]
        lines.append([label, row["dtype"], row["name"], *numbers])
    return markdown(head, lines)


def _label(row, axes=None):
    return f"{row['case']} ({', '.join(str(n) for n in row['shape'][:axes])})"


def timed(rows):
    """Do these rows hold times of kernels, as the benches of this package write them?"""
    return all({"case", "shape", "dtype", "name"} <= row.keys() for row in rows)


def _time(row, lead, kind):
    if kind not in row:
        return ""
    time = row[kind]["median"]
    ratio = row["name"] != lead["name"] and kind in lead
    return (
        f"{time:.3f}" if time < 1e4 else f"{time:,.0f}"
    ) + f" ({time / lead[kind]['median']:.2f}x)" * ratio


def shown(value):
    """A value of a result as a cell."""
    if isinstance(value, dict):
        if "median" in value:
            return shown(value["median"])
        return ", ".join(f"{name} {shown(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        nested = any(isinstance(entry, list) for entry in value)
        return ("; " if nested else ", ").join(shown(entry) for entry in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
    return "" if value is None else str(value)


def markdown(head, lines):
    """A Markdown table."""
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])
