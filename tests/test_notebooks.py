"""The notebooks keep the rules of notebook_lint.py, and each rule names a notebook that breaks it."""

import json
from pathlib import Path

import pytest
from notebook_lint import RULES, lint

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_keeps_every_rule(name):
    assert lint(FOLDER / name) == {}


def test_every_notebook_is_numbered():
    numbers = [name[:2] for name in NOTEBOOKS]
    assert all(number.isdigit() for number in numbers)
    assert len(numbers) == len(set(numbers))


HEADER = """# {number} · A title

**Question** What is checked?

**You will be able to** see it.

**Prerequisites** {prerequisites}

**Runtime** 1 s on a CPU.

**Paper** Section 2."""


def markdown(name, source):
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": source}


def code(name, count, source, *outputs):
    return {
        "cell_type": "code", "execution_count": count, "id": name, "metadata": {},
        "outputs": list(outputs), "source": source,
    }  # fmt: skip


def result(**data):
    data = {kind.replace("_", "/"): value for kind, value in data.items()}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def stream(name, text):
    return {"output_type": "stream", "name": name, "text": text}


def good(number, prerequisites, following):
    """A notebook that keeps every rule."""
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "cells": [
            markdown("header", HEADER.format(number=number, prerequisites=prerequisites)),
            code("setup", 1, "x = 1\nprint(x)", stream("stdout", "1\n")),
            markdown("math", "The state is\n\n$$\nh_t = a h_{t-1}\n$$\n\nand `$$` or $h[0](t)$ is not."),
            code("figure", 2, "plt.show()", result(image_png="AAAA", text_plain="<Figure>")),
            markdown("finding", "**Figure.** It decays."),
            markdown("checked", "## What we checked"),
            code("claims", 3, "claims_table()", result(text_markdown="| claim |\n|---|\n| a |")),
            markdown("exercises", "## Exercises\n\n**Prove.** It."),
            markdown("next", f"## Next\n\n{following}"),
        ],
    }


BAD = []


def bad(rule):
    """Register a change after which a good notebook breaks this one rule."""

    def register(change):
        BAD.append(pytest.param(rule, change, id=change.__name__))
        return change

    return register


@bad("executed_in_order")
def a_cell_was_run_again(notebook, cell):
    cell["figure"]["execution_count"] = 7


@bad("executed_in_order")
def a_cell_was_not_run(notebook, cell):
    cell["claims"]["execution_count"] = None


@bad("cell_ids")
def a_cell_without_id(notebook, cell):
    del cell["math"]["id"]


@bad("cell_ids")
def two_cells_of_one_id(notebook, cell):
    cell["math"]["id"] = "setup"


@bad("no_errors")
def an_error_is_stored(notebook, cell):
    cell["setup"]["outputs"] = [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]


@bad("no_stderr")
def a_warning_is_stored(notebook, cell):
    cell["setup"]["outputs"] = [stream("stderr", "UserWarning: x")]


@bad("no_skipped_cells")
def a_tag_skips_a_cell(notebook, cell):
    cell["setup"]["metadata"]["tags"] = ["nbval-skip"]


@bad("no_skipped_cells")
def a_comment_skips_a_cell(notebook, cell):
    cell["setup"]["source"] = ["# NBVAL_SKIP\n", "x = 1"]


@bad("plain_python")
def a_magic(notebook, cell):
    cell["setup"]["source"] = "%matplotlb inline\nx = 1"


@bad("plain_python")
def a_shell_command(notebook, cell):
    cell["setup"]["source"] = "!false"


@bad("no_machine_paths")
def a_path_in_a_source(notebook, cell):
    cell["setup"]["source"] = "open('/home/someone/data.txt')"


@bad("no_machine_paths")
def a_path_in_an_output(notebook, cell):
    cell["setup"]["outputs"] = [stream("stdout", ["fine\n", "saved to /tmp/figure.png\n"])]


@bad("no_machine_paths")
def a_windows_path(notebook, cell):
    cell["setup"]["outputs"] = [stream("stdout", "C:\\Users\\someone")]


@bad("no_machine_paths")
def a_path_in_the_metadata(notebook, cell):
    notebook["metadata"]["papermill"] = {"input_path": "/home/me/a.ipynb"}


@bad("file_size")
def a_heavy_picture(notebook, cell):
    cell["figure"]["outputs"] = [result(image_png="A" * 1_000_000, text_plain="<Figure>")]


@bad("output_size")
def a_long_print(notebook, cell):
    cell["setup"]["outputs"] = [stream("stdout", "x" * 200_001)]


@bad("output_size")
def a_long_page(notebook, cell):
    cell["setup"]["outputs"] = [result(text_html=["x" * 100_000] * 3)]


@bad("kernelspec")
def another_kernel(notebook, cell):
    notebook["metadata"]["kernelspec"]["name"] = "my-env"


@bad("header")
def another_number(notebook, cell):
    cell["header"]["source"] = HEADER.format(number="03", prerequisites="00")


@bad("header")
def a_field_is_missing(notebook, cell):
    cell["header"]["source"] = cell["header"]["source"].replace("**Runtime** 1 s on a CPU.\n\n", "")


@bad("header")
def two_fields_in_one_paragraph(notebook, cell):
    cell["header"]["source"] = cell["header"]["source"].replace("\n\n**Paper**", "\n**Paper**")


@bad("header")
def an_empty_field(notebook, cell):
    cell["header"]["source"] = cell["header"]["source"].replace(" 1 s on a CPU.", "")


@bad("cell_length")
def a_long_cell(notebook, cell):
    cell["setup"]["source"] = "x = 1\n" * 41


@bad("display_math")
def math_inside_a_paragraph(notebook, cell):
    cell["math"]["source"] = "The state is\n$$\nh_t\n$$"


@bad("display_math")
def math_on_a_line(notebook, cell):
    cell["math"]["source"] = "The state is $$h_t$$ here."


@bad("links")
def a_link_to_nothing(notebook, cell):
    cell["math"]["source"] = "See [there](../missing.md)."


@bad("pictures_are_here")
def a_remote_picture(notebook, cell):
    cell["math"]["source"] = "![far](https://example.org/a.png)"


@bad("pictures_are_here")
def an_attachment(notebook, cell):
    cell["math"]["attachments"] = {"a.png": {"image/png": "AAAA"}}


@bad("figure_captions")
def a_figure_without_finding(notebook, cell):
    cell["finding"]["source"] = "It decays."


@bad("closing")
def no_table_of_claims(notebook, cell):
    cell["claims"]["outputs"] = [result(text_markdown="nothing was checked")]


@bad("closing")
def an_empty_table(notebook, cell):
    cell["claims"]["outputs"] = [result(text_markdown="| claim | bound |\n|---|---|")]


@bad("closing")
def no_exercises(notebook, cell):
    notebook["cells"].remove(cell["exercises"])


@bad("reading_order")
def a_prerequisite_that_comes_later(notebook, cell):
    cell["header"]["source"] = HEADER.format(number="01", prerequisites="02")


@bad("reading_order")
def no_prerequisite(notebook, cell):
    cell["header"]["source"] = HEADER.format(number="01", prerequisites="none")


@pytest.fixture
def lint_changed(tmp_path):
    """Write two notebooks that follow each other, change the second one and lint it."""

    def lint_changed(change=None):
        first, second = good("00", "Algebra.", "[01](01_b.ipynb)"), good("01", "00", "[00](00_a.ipynb)")
        if change:
            change(second, {cell["id"]: cell for cell in second["cells"]})
        for name, notebook in {"00_a.ipynb": first, "01_b.ipynb": second}.items():
            (tmp_path / name).write_text(json.dumps(notebook), "utf-8")
        assert lint(tmp_path / "00_a.ipynb") == {}
        return lint(tmp_path / "01_b.ipynb")

    return lint_changed


def test_a_good_notebook_passes(lint_changed):
    assert lint_changed() == {}


@pytest.mark.parametrize(("rule", "change"), BAD)
def test_a_bad_notebook_is_named(lint_changed, rule, change):
    assert set(lint_changed(change)) == {rule}


def test_next_leads_to_the_following_notebook(tmp_path):
    (tmp_path / "00_a.ipynb").write_text(json.dumps(good("00", "Algebra.", "The end.")), "utf-8")
    assert lint(tmp_path / "00_a.ipynb") == {}
    (tmp_path / "01_b.ipynb").write_text("{}", "utf-8")
    assert set(lint(tmp_path / "00_a.ipynb")) == {"reading_order"}


def test_each_rule_has_a_bad_notebook():
    assert {param.values[0] for param in BAD} == set(RULES)
