"""The page on training: its example prints what it says, its table is that of the configurations."""

import contextlib
import io
import re
from pathlib import Path

from mamba_fast.train import load_config
from mamba_fast.train.config import packaged

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")


def section(name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL)[1]


def test_the_example_prints_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", section("example"), re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "training.md", "exec"), {})
    assert out.getvalue() == printed
    assert (tmp_path / "out" / "tiny" / "curve.png").exists()


def test_the_table_is_that_of_the_configurations():
    _, _, *rows = section("configurations").splitlines()
    cells = {row[0]: row[1:] for row in ([c.strip() for c in line.strip("|").split("|")] for line in rows)}
    assert list(cells) == list(packaged())
    words = {"induction": "induction heads, table 2", "copying": "selective copying, table 1", "text": "text"}
    for name, (task, model, step) in cells.items():
        config = load_config(name)
        assert task == words[config.task]
        assert model == f"d_model {config.model['d_model']}, {config.model['n_layer']} layers"
        unit = "bytes" if name == "bytes" else "tokens"
        rows = config.batch_size * config.accumulate
        assert step == f"{rows} x {config.seqlen} {unit}, {config.dtype}"
