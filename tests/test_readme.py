"""The README's example prints what the page says, and its tables are the committed results."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from mamba_fast.bench import figure, readme

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
README = (ROOT / "README.md").read_text("utf-8")
OURS = ("torch", "numba", "triton", "cuda")
COLUMNS = {"forward": "forward", "backward": "backward", "forward + backward": "forward_backward"}


def section(name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL)[1]


@pytest.mark.parametrize("name", ["example", "model example"])
def test_the_example_prints_what_the_page_says(name):
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", section(name), re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue() == printed


@pytest.mark.parametrize("name", ["scan-nvidia-h200", "scan-cpu-2-threads"])
def test_the_tables_are_the_committed_results(name):
    facts = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
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


def test_the_command_writes_what_is_committed(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(README, "utf-8")
    names = readme.rewrite(page, RESULTS)
    assert page.read_text("utf-8") == README
    assert {"scan-nvidia-h200", "scan-cpu-2-threads"} <= set(names)
    stems = {path.stem for path in RESULTS.glob("*.json")}
    assert set(names) == stems & set(re.findall(r"<!-- ([\w.-]+) -->", README))


def test_another_result_makes_another_table(tmp_path):
    case = {"case": "c", "shape": [1, 2], "dtype": "float32"}
    rows = [
        {**case, "name": "other", "total": {"median": 3.0}, "tokens_per_s": 12345.6},
        {**case, "name": "mine", "total": {"median": 2.0}, "token": 0.25, "role": "ours"},
    ]
    (tmp_path / "conv-x.json").write_text(json.dumps({"rows": rows}), "utf-8")
    (tmp_path / "train-x.json").write_text(json.dumps({"rows": [{"batch": 8, "seconds": 1 / 3}]}), "utf-8")
    page = tmp_path / "page.md"
    kept = "<!-- nothing-x -->\nkept\n<!-- /nothing-x -->"
    page.write_text(
        f"<!-- conv-x -->\n<!-- /conv-x -->\n<!-- train-x -->\nold\n<!-- /train-x -->\n{kept}", "utf-8"
    )
    assert readme.rewrite(page, tmp_path) == ["conv-x", "train-x"]
    lines = page.read_text("utf-8").splitlines()
    assert lines[1] == "| case (shape) | type | kernel | total | a token | tokens/s |"
    assert lines[3] == "| c (1, 2) | float32 | other | 3.000 (1.50x) |  | 12,346 |"
    assert lines[4] == "| c (1, 2) | float32 | mine | 2.000 | 0.25 |  |"
    assert lines[9:12] == ["| batch | seconds |", "|---|---|", "| 8 | 0.3333 |"]
    assert page.read_text("utf-8").endswith(kept)


def benches():
    """The committed results of a bench that is drawn."""
    results = {path: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    return {path: result for path, result in results.items() if result.get("bench") in figure.TITLES}


@pytest.mark.parametrize("path", benches(), ids=lambda path: path.stem)
def test_a_figure_was_drawn_from_the_result_beside_it(path):
    """Else: python -m mamba_fast.bench readme."""
    picture, result = path.with_suffix(".png").read_bytes(), benches()[path]
    assert figure.source(result).encode() in picture
    assert figure.source(result | {"date": "2000-01-01"}).encode() not in picture


def test_the_command_draws_every_figure_of_a_bench(tmp_path):
    for name in ("scan-nvidia-h200", "scan-cpu-2-threads"):
        (tmp_path / f"{name}.json").write_text((RESULTS / f"{name}.json").read_text("utf-8"), "utf-8")
    (tmp_path / "induction.json").write_text('{"seeds": [1, 2, 3]}', "utf-8")
    assert readme.redraw(tmp_path) == ["scan-nvidia-h200"]
    assert [path.name for path in tmp_path.glob("*.png")] == ["scan-nvidia-h200.png"]
