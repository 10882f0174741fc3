"""The README's example prints what the page says, and its tables are the committed results."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
OURS = ("torch", "numba", "triton", "cuda")
COLUMNS = {"forward": "forward", "backward": "backward", "forward + backward": "forward_backward"}


def section(name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL)[1]


def test_the_example_prints_what_the_page_says():
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", section("example"), re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue() == printed


@pytest.mark.parametrize(
    "name, result", [("gpu", "scan-nvidia-h200.json"), ("cpu", "scan-cpu-2-threads.json")]
)
def test_the_tables_are_the_committed_results(name, result):
    facts = json.loads((ROOT / "docs" / "results" / result).read_text("utf-8"))
    assert facts["checks"] == "passed"
    head, _, *shown = [
        [c.strip() for c in line.split("|")[1:-1]] for line in section(name).splitlines() if "|" in line
    ]
    kinds = [COLUMNS[title] for title in head[3:]]
    assert len(kinds) == 2
    assert len(shown) == len(facts["rows"])
    leads = {}  # the first kernel of ours in each case, which ratios refer to
    for row in facts["rows"]:
        if row["name"] in OURS:
            leads.setdefault((row["case"], row["dtype"]), row)
    for cells, row in zip(shown, facts["rows"], strict=True):
        shape = ", ".join(str(n) for n in row["shape"][:3])
        assert cells[:3] == [f"{row['case']} ({shape})", row["dtype"], row["name"]]
        lead = leads[row["case"], row["dtype"]]
        for cell, kind in zip(cells[3:], kinds, strict=True):
            if kind in row:
                time = row[kind]["median"]
                ratio = f" ({time / lead[kind]['median']:.2f}x)" if row is not lead else ""
                assert cell == f"{time:.3f}{ratio}"
            else:
                assert cell == ""
