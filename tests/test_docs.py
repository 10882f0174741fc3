"""The written documentation says what the code says: names, constants, bytes, tables of numbers."""

import ast
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from cases import at_precision, check_agrees, outcome, weights_of
from markdown_links import FENCED
from scan_inputs import scan_inputs

from mamba_fast import selective_scan_fn

ROOT = Path(__file__).parent.parent
PACKAGES = ("mamba_ref", "mamba_fast")
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "mamba_fast/ops/selective_scan/README.md"])
NUMBER = re.compile(r"(?<![\w.^])\d+(?:\.\d+)?(?:e[-+]\d+)?")


def text(page):
    return (ROOT / page).read_text("utf-8")


def tree(path):
    return ast.parse(path.read_text("utf-8"))


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def spans(markdown):
    """The code spans of a page, without its fenced blocks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(FENCED, "", markdown))


def tables(markdown):
    """Every table of a page as a list of rows, each a dict from the head of a column to its cell."""
    found, head = [], None
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = cells
            found.append([])
        elif set(line) - set("|-: "):
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found


def variables(path):
    """Names of parameters and of what is assigned to, attributes included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def defined(path):
    """The same, and the names of functions, classes and modules, its own or imported."""
    yield from variables(path)
    yield path.parent.name if path.stem == "__init__" else path.stem
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.name for alias in node.names)


def test_every_code_name_of_the_notation_is_a_parameter_or_a_variable():
    known = {name for path in sources(*PACKAGES) for name in variables(path)}
    rows = [row for table in tables(text("docs/notation.md")) for row in table]
    names = [spans(row["code"]) for row in rows]
    assert [row for row, found in zip(rows, names, strict=True) if not found] == []
    assert sorted({name for found in names for name in found} - known) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_name_in_a_code_span_exists(page):
    """A bare name is defined somewhere; a name with a dot or a slash is a module, its member or a file."""
    files = {path.name for path in sources(*PACKAGES, "tests")}
    known = {name for path in sources(*PACKAGES, "tests", "docs") for name in defined(path)}
    for kernels in [path for package in PACKAGES for path in (ROOT / package).rglob("*.cu*")]:
        files.add(kernels.name)
        known.update(re.findall(r"\w+", kernels.read_text("utf-8")))
    missing = []
    for span in spans(page.read_text("utf-8")):
        if re.fullmatch(r"[A-Za-z_]\w*", span):
            whole = span.strip("_") == span or span in known
            missing += [span] * (not any(span in name if not whole else span == name for name in known))
        elif re.fullmatch(r"(mamba_ref|mamba_fast)[\w.]+", span):
            missing += [span] * (not exists(span.split("."), known))
        elif re.fullmatch(r"[\w./]+\.(py|md|cfg|toml|txt|yml|ipynb)|[\w.]+/[\w./]*", span):
            found = span in files or any((folder / span).exists() for folder in (ROOT, page.parent))
            missing += [span] * (not found)
    assert missing == []


def exists(parts, known):
    """Is a.b.c a module, or a name after one?"""
    path = ROOT.joinpath(*parts)
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    return parts[-1] in known and exists(parts[:-1], known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_quoted_constants_are_those_of_the_code(page):
    constants = [pair for path in sources(*PACKAGES) for pair in assigned(tree(path))]
    for name, value in re.findall(r"`(\w+)` = (\d+)", page.read_text("utf-8")):
        found = [v for n, v in constants if n == name]
        assert int(value) in [c.value for v in found for c in ast.walk(v) if isinstance(c, ast.Constant)], (
            name
        )


def assigned(module):
    """(name, expression) of what a module assigns at its top level; a, b = 1, 2 are two."""
    for node in module.body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = zip(target.elts, value.elts, strict=True)
            yield from ((t.id, v) for t, v in pairs if isinstance(t, ast.Name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_stays_short(page):
    assert len(page.read_text("utf-8").splitlines()) <= 180


def test_the_bad_is_seen(tmp_path):
    """The readers above find what they are for."""
    page = "| code | x |\n|---|---|\n| `h`, `a` | 1 |\n\ntext `b`\n\n```\n`not this`\n```\n"
    assert tables(page) == [[{"code": "`h`, `a`", "x": "1"}]]
    assert spans(page) == ["h", "a", "b"]
    module = tmp_path / "room.py"
    module.write_text("def f(x):\n    y = x.z\n    y.w = 1\n", "utf-8")
    assert set(variables(module)) == {"x", "y", "w"}
    assert set(defined(module)) == {"x", "y", "w", "room", "f"}
    a, b, c = assigned(ast.parse("a, b = 1, 2\nc = 3 if a else 4"))
    assert (a[0], a[1].value, b[0], b[1].value, c[0]) == ("a", 1, "b", 2, "c")
    assert not exists(["mamba_ref", "checks", "no_such_name"], {"bound"})
    assert exists(["mamba_ref", "checks", "bound"], {"bound"})
    assert not same_numbers("| 1.0 | a |", "| 1.3 | a |")
    assert not same_numbers("| 1.0 | a |", "| 1.0 | b |")
    assert same_numbers("| 1.0 | 2e-07 |", "| 1.1 | 1.9e-07 |")


def same_numbers(page, computed):
    """Equal text, and numbers within a fifth: another CPU's library rounds otherwise."""
    pairs = zip(NUMBER.findall(page), NUMBER.findall(computed), strict=False)
    return NUMBER.sub("", page) == NUMBER.sub("", computed) and all(
        math.isclose(float(a), float(b), rel_tol=0.2) for a, b in pairs
    )


@pytest.mark.numba
def test_the_tables_of_numerics_are_what_the_script_computes():
    script = runpy.run_path(str(ROOT / "docs" / "numerics.py"))
    page = text("docs/numerics.md")
    assert re.findall(r"<!-- (\w+) -->", page) == [*script["TABLES"]]
    for name, table in script["TABLES"].items():
        written = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", page, re.DOTALL)[1]
        computed = script["markdown"](table())
        assert same_numbers(written, computed), computed


def formulas(**sizes):
    """The table of bytes in docs/kernels.md: {kernel: (its formula at these sizes, the number beside it)}."""
    rows = next(table for table in tables(text("docs/kernels.md")) if "bytes" in table[0])
    head = next(name for name in rows[0] if name.startswith("at "))
    return {r["kernel"].replace("`", ""): (eval(*spans(r["bytes"]), sizes), float(r[head])) for r in rows}


def test_the_example_in_the_table_of_bytes_is_worked_out_right():
    page = text("docs/kernels.md")
    block_d, block_l = (int(re.search(rf"`{name}` = (\d+)", page)[1]) for name in ("_BLOCK_D", "CHUNK"))
    assert "at N = 16, w = 2" in page
    for name, (value, written) in formulas(N=16, w=2, BLOCK_D=block_d, BLOCK_L=block_l).items():
        assert written == pytest.approx(value, abs=0.051), name


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="only Triton's interpreter can be watched")
@pytest.mark.parametrize("split", [False, True])
def test_the_kernels_move_the_bytes_of_the_table(split, monkeypatch):
    from mamba_fast.ladder.trace import trace
    from mamba_fast.ops.selective_scan import triton_scan

    monkeypatch.setattr(triton_scan, "_PROGRAMS_A_MULTIPROCESSOR", 1000 if split else 0)
    inputs = scan_inputs(0, 1, 8, 96, 3)  # several blocks, three tiles
    with trace() as log:
        check_agrees(inputs, "triton")  # the torch loops in it launch no kernel
    once = {("chain_kernel", "A"), ("chain_kernel", "edge")}  # for a whole sequence
    moved = [0] * len(log.launches)
    for access in log.accesses:
        if access.tensor not in ("bias", "D") and (log.launches[access.launch][0], access.tensor) not in once:
            moved[access.launch] += len(access.index) * access.itemsize
    want = formulas(N=3, w=4, BLOCK_D=triton_scan._BLOCK_D, BLOCK_L=triton_scan.CHUNK)
    launched = ["tile_summary_kernel, {}", "chain_kernel", "scan_{}_kernel"] if split else ["scan_{}_kernel"]
    launched = [name.format(way) for way in ("forward", "backward") for name in launched]
    assert len(launched) == len(moved)
    for name, size in zip(launched, moved, strict=True):
        if not (split and name.startswith("scan")):  # these then write no states
            assert size / inputs["u"].numel() == want[name][0], name


def two_runs(backend, device, d_inner, change):
    """Every result for seeded inputs and for changed ones."""
    inputs = at_precision(scan_inputs(3, 2, d_inner, 40, 2), torch.float32, device)
    weights = weights_of(inputs)
    clean = outcome(selective_scan_fn, inputs, weights, backend=backend)
    change(inputs)
    return clean, outcome(selective_scan_fn, inputs, weights, backend=backend)


@pytest.mark.numba
def test_numba_gives_the_same_bits_with_any_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, more = two_runs("numba", "cpu", 37, lambda inputs: torch.set_num_threads(3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], more[name]) for name in one)


def test_a_nan_in_delta_spoils_no_gradient_of_another_channel(backend, device):
    def spoil(inputs):
        inputs["delta"][1, 3, 20] = float("nan")

    clean, dirty = two_runs(backend, device, 5, spoil)
    assert dirty["du"][1, 3, :21].isnan().all()  # gradients run from later tokens to earlier ones
    assert dirty["dB"][1].isnan().any()
    for name in ("y", "du", "ddelta", "dz", "last_state", "dinitial_state"):
        clean[name][1, 3] = dirty[name][1, 3] = 0
    for name in ("dA", "dD", "ddelta_bias"):
        clean[name][3] = dirty[name][3] = 0
    for name in clean.keys() - {"dB", "dC"}:  # these two are summed in any order on a GPU
        torch.testing.assert_close(dirty[name], clean[name], rtol=0, atol=0, msg=name)


@pytest.mark.triton
def test_small_steps_after_large_ones_keep_their_digits(monkeypatch):
    """In tiles whose steps add up to 600, those at both ends are near 0.05. Each tile is its own program."""
    from mamba_fast.ops.selective_scan import triton_scan

    monkeypatch.setattr(triton_scan, "_PROGRAMS_A_MULTIPROCESSOR", 10**9)
    monkeypatch.setattr(triton_scan, "CHUNK", 32)
    inputs = scan_inputs(12, 1, 3, 96, 2, delta_softplus=False, delta_bias=False)
    large = (torch.arange(96) % 32 - 16).abs() < 8
    inputs["delta"] = torch.where(large, 37 + inputs["delta"], inputs["delta"] / 10)
    check_agrees(inputs, "triton", device="cuda" if torch.cuda.is_available() else "cpu")
