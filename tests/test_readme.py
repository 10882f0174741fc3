"""The README's example prints what the page says, and its tables are the committed results."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
OURS = ("torch", "numba", "triton")


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
    shown = [
        [c.strip() for c in line.split("|")[1:-1]] for line in section(name).splitlines() if "|" in line
    ][2:]
    ours = {(r["case"], r["dtype"]): r for r in facts["rows"] if r["name"] in OURS}
    assert len(shown) == len(facts["rows"])
    for cells, row in zip(shown, facts["rows"], strict=True):
        shape = ", ".join(str(n) for n in row["shape"][:3])
        assert cells[:3] == [f"{row['case']} ({shape})", row["dtype"], row["name"]]
        mine = ours[row["case"], row["dtype"]]
        for cell, kind in zip(cells[3:], ("forward", "forward_backward"), strict=True):
            if kind in row:
                time, rival = row[kind]["median"], row is not mine
                ratio = f" ({time / mine[kind]['median']:.2f}x)" if rival else ""
                assert cell == f"{time:.3f}{ratio}"
            else:
                assert cell == ""
