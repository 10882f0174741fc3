"""The documentation as a site: nothing is missing from it, and it works from disk without a network."""

import ast
import html
import importlib
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import site_browser
from selenium.webdriver.common.by import By

import mamba_fast

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs" / "site"
SOURCES = ("*.md", "docs/*.md", "mamba_fast/ops/*/README.md", "notebooks/*.ipynb", "docs/results/*.json")
READABLE = 4.5  # the contrast that WCAG 2 asks of text (success criterion 1.4.3)
READ = (
    "index", "docs/numerics", "docs/testing", "notebooks/05_backward_by_hand", "api/mamba_fast",
    "docs/results/scan-nvidia-h200",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. A warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, SITE / "build.py", folder], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if lacks := site_browser.missing():
        pytest.skip(f"this machine has no {lacks}")
    browser = site_browser.Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def public_names():
    """(package, name) of the functions and classes that modules export: __all__, else what is documented.

    The folder of an op exports what its __init__ does, and a Triton kernel is no function of Python.
    """
    for path in [path for package in ("mamba_fast", "mamba_ref") for path in (ROOT / package).rglob("*.py")]:
        package, *inside = path.relative_to(ROOT).with_suffix("").parts
        if (inside[0] == "ops" and inside[-1] != "__init__") or re.match("nvrtc|__main__", inside[-1]):
            continue
        body = ast.parse(path.read_text("utf-8")).body
        lists = [
            n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
        ]
        if lists:
            module = importlib.import_module(".".join([package, *inside]).removesuffix(".__init__"))
            members = {name: getattr(module, name) for name in ast.literal_eval(lists[0])}
            yield from (
                (package, n) for n, m in members.items() if inspect.isroutine(m) or inspect.isclass(m)
            )
        for node in body if not lists else ():
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                if not kernel and not node.name.startswith("_"):
                    yield package, node.name


def test_every_page_is_there(site):
    """Whether a table of contents leads to it, Sphinx itself sees to."""
    sources = [path.relative_to(ROOT) for pattern in SOURCES for path in ROOT.glob(pattern)]
    assert len(sources) > 20
    assert [str(path) for path in sources if not (site / path.with_suffix(".html")).exists()] == []


def test_every_public_name_has_its_place_in_the_api(site):
    pages = "".join(page.read_text("utf-8") for page in (site / "api").glob("*.html"))
    anchors = re.findall(r'<dt class="sig [^"]*" id="([\w.]+)"', pages)
    there = {(name.split(".")[0], name.split(".")[-1]) for name in anchors}
    assert {f"mamba_fast.{name}" for name in mamba_fast.__all__} <= set(anchors)
    wanted = set(public_names())
    assert len(wanted) > 200
    assert sorted(wanted - there) == []


def inked(text):
    """A text without spaces and without what a model of bytes may print that is no character."""
    return "".join(c for c in text if c.isprintable() and c not in " \N{REPLACEMENT CHARACTER}")


def test_a_notebook_shows_its_committed_outputs(site):
    notebooks = sorted(ROOT.glob("notebooks/*.ipynb"))
    assert len(notebooks) > 7
    for path in notebooks:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        page = (site / "notebooks" / f"{path.stem}.html").read_text("utf-8")
        assert len(re.findall(r'<img [^>]*src="../_images/', page)) == pictures, path.name
        text = inked(html.unescape(re.sub(r"<[^>]+>", "", page)))
        printed = [inked("".join(output["text"])) for output in outputs if output["output_type"] == "stream"]
        assert [output for output in printed if output not in text] == [], path.name


def test_every_table_is_read_as_one(site):
    """A row that stands apart from its head is a paragraph that begins with a bar."""
    texts = {page: page.read_text("utf-8") for page in site.rglob("*.html")}
    assert sum(text.count("<table") for text in texts.values()) > 40
    assert [page.name for page, text in texts.items() if re.search(r"<p>\s*\|", text)] == []


def test_a_result_shows_its_figure_and_its_numbers(site):
    page = (site / "docs/results/scan-nvidia-h200.html").read_text("utf-8")
    rows = json.loads((ROOT / "docs/results/scan-nvidia-h200.json").read_text("utf-8"))["rows"]
    assert 'src="../../_images/scan-nvidia-h200.png"' in page
    assert all(f"{row['forward']['median']:.3f}" in page for row in rows)


def test_what_leads_nowhere_is_refused(tmp_path):
    bad = [
        "[x](missing.md)",
        "[x](#no-heading)",
        "{py:func}`mamba_fast.no_such_function`",
        "{no-such-role}`x`",
    ]
    (tmp_path / "index.md").write_text("# Title\n\n" + "\n\n".join(bad), "utf-8")
    (tmp_path / "other.md").write_text("# Nothing leads here\n", "utf-8")
    options = ["-W", "--keep-going", "-q", "-c", SITE, "-b", "html", tmp_path, tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(SITE)},
    )  # fmt: skip
    assert done.returncode
    for name in ("missing.md", "no-heading", "no_such_function", "no-such-role", "other.md: WARNING"):
        assert name in done.stderr


def test_a_docstring_is_plain_text():
    plain = runpy.run_path(str(SITE / "api.py"))["plain"]

    def read(text):
        lines = text.splitlines()
        plain(None, "function", "f", None, None, lines)
        return lines

    assert read("|y| is x_ * 2 of `a*b|c_`\n    and more") == [r"\|y\| is x\_ \* 2 of `a*b|c_` and more"]
    assert read("Like this:\n\n    a * b\n\nand on") == ["Like this::", "", "    a * b", "", "and on"]
    heading = ["Parameters", "----------"]
    assert read("f.\n\nu : (B,)\n    input\nz : gate\nand on") == [
        "f.",
        "",
        *heading,
        "u : (B,) input",
        "z : gate and on",
        "",
    ]
    assert read("Parameters\n----------\nu : (B,)\n    input") == [*heading, "u : (B,) input"]


def test_every_page_on_a_phone_without_a_network(site, browser):
    """Formulas are set, pictures are there, nothing is wider than the page, nothing is asked of a server."""
    formulas = pictures = 0
    for page in sorted(site.rglob("*.html")):
        browser.open(page, site_browser.PHONE)
        asked, elsewhere = browser.requests()
        assert (page.name, elsewhere, browser.errors()) == (page.name, [], [])
        assert asked > 3
        seen = [
            browser.ask(script) for script in (site_browser.UNSET, site_browser.HIDDEN, site_browser.WIDTH)
        ]
        assert (page.name, seen) == (page.name, [0, [], site_browser.PHONE])
        formulas += browser.ask(site_browser.SET)
        pictures += browser.ask(site_browser.IMAGES)
    assert formulas > 100
    assert pictures > 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(site, browser, scheme):
    for page in READ:
        browser.open(site / f"{page}.html", scheme=scheme)
        assert browser.ask(site_browser.WIDTH) <= browser.ask("return innerWidth") == 1400
        contrast, text, background = browser.ask(site_browser.CONTRAST, "body")
        assert contrast >= READABLE, f"{page}: {text}"
        assert (background < 0.05) == (scheme == "dark")


def test_search_finds_a_symbol(site, browser):
    browser.open(site / "index.html")
    box = browser.driver.find_element(By.CSS_SELECTOR, ".sidebar-search")
    box.send_keys("selective_scan_fn")
    box.submit()
    assert browser.wait(lambda: browser.ask(site_browser.RESULTS), seconds=20)
    symbol, *others = browser.ask(site_browser.RESULTS)
    assert symbol[0] == "mamba_fast.selective_scan_fn"
    assert any("05_backward_by_hand.html" in address for _, address in others)
    browser.driver.get(symbol[1])
    assert (
        browser.ask("return document.querySelector(':target').textContent")
        .strip()
        .startswith(f"{symbol[0]}(u,")
    )
    assert (browser.requests()[1], browser.errors()) == ([], [])


def test_what_is_wrong_with_a_page_is_seen(tmp_path, browser):
    page = tmp_path / "page.html"
    page.write_text(
        """<!doctype html><meta name="viewport" content="width=device-width"><body><span class="math">x</span>
        <img src="missing.png"><script src="https://example.org/a.js"></script><article>
        <p style="width: 500px; color: #888; background: #ddd">wide and pale</p></article>""",
        "utf-8",
    )
    browser.open(page, site_browser.PHONE, patience=0.1)
    assert browser.requests()[1] == ["https://example.org/a.js"]
    assert len(browser.errors()) == 2  # the script and the picture
    assert browser.ask(site_browser.UNSET) == 1
    assert [Path(source).name for source in browser.ask(site_browser.HIDDEN)] == ["missing.png"]
    assert browser.ask(site_browser.WIDTH) > site_browser.PHONE
    contrast, text, _ = browser.ask(site_browser.CONTRAST, "body")
    assert (round(contrast, 2), text) == (2.61, "wide and pale")
