"""The rules that every committed notebook keeps. A rule takes (notebook, path) and yields what is wrong."""

import ast
import json
import re
from pathlib import Path

from markdown_links import broken_links, remote_images, without_code

FIELDS = ["Question", "You will be able to", "Prerequisites", "Runtime", "Paper"]
FOLDERS = "root|home|work|tmp|var|opt|mnt|Users|private"
MACHINE_PATH = re.compile(
    rf"(?<![\w/.<-])/(?:{FOLDERS})\b|\b[A-Za-z]:\\+(?:Users|Windows|Program|Temp|Python)|ipykernel_\d+"
)
RULES = {}


def rule(function):
    RULES[function.__name__] = function
    return function


def lint(path):
    """{rule: [what is wrong]} for the rules that the notebook breaks."""
    notebook = json.loads(Path(path).read_text("utf-8"))
    found = {name: list(check(notebook, Path(path))) for name, check in RULES.items()}
    return {name: problems for name, problems in found.items() if problems}


def text(value):
    """A cell's source or an output's text: nbformat stores a string or a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def cells(notebook, kind):
    return [(i, cell) for i, cell in enumerate(notebook["cells"]) if cell["cell_type"] == kind]


def outputs(notebook):
    return [(i, out) for i, cell in cells(notebook, "code") for out in cell["outputs"]]


def tags(cell):
    return cell["metadata"].get("tags", [])


def has_image(cell):
    return any(kind.startswith("image/") for out in cell["outputs"] for kind in out.get("data", {}))


def paragraphs(source):
    return [p.strip() for p in re.split(r"\n\s*\n", source) if p.strip()]


def strings(value, key=""):
    """Every string in the notebook but image data."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from strings(child, name)
    elif isinstance(value, list):
        for child in value:
            yield from strings(child, key)
    elif isinstance(value, str) and not key.startswith("image/"):
        yield value


@rule
def executed_in_order(notebook, path):
    counts = [cell["execution_count"] for _, cell in cells(notebook, "code")]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}"


@rule
def cell_ids(notebook, path):
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(ids) != len(set(ids)):
        yield f"ids are missing or repeated: {ids}"


@rule
def no_errors(notebook, path):
    for i, cell in cells(notebook, "code"):
        kinds = [out["output_type"] for out in cell["outputs"]]
        if "error" in kinds and "raises-exception" not in tags(cell):
            yield f"cell {i} ends in an error and has no tag raises-exception"


@rule
def no_stderr(notebook, path):
    for i, out in outputs(notebook):
        if out.get("name") == "stderr":
            yield f"cell {i} writes to stderr: {text(out['text'])[:60]!r}"


@rule
def no_skipped_cells(notebook, path):
    for i, cell in cells(notebook, "code"):
        if "nbval-skip" in tags(cell) or "NBVAL_SKIP" in text(cell["source"]):
            yield f"cell {i} is left out of the test"


@rule
def plain_python(notebook, path):
    """A misspelt magic and a failing shell command both pass unseen when the notebook is tested."""
    for i, cell in cells(notebook, "code"):
        try:
            ast.parse(text(cell["source"]))
        except SyntaxError as error:
            yield f"cell {i}: {error}"


@rule
def no_machine_paths(notebook, path):
    for string in strings(notebook):
        if found := MACHINE_PATH.search(string):
            yield f"{found[0]} in {string[:80]!r}"


@rule
def file_size(notebook, path):
    if path.stat().st_size > 1_000_000:
        yield f"{path.stat().st_size} bytes"


@rule
def output_size(notebook, path):
    for i, out in outputs(notebook):
        data = {"stream": out.get("text", ""), **out.get("data", {})}
        for kind, value in data.items():
            if not kind.startswith("image/") and len(text(value).encode()) > 200_000:
                yield f"cell {i}: {len(text(value))} characters of {kind}"


@rule
def kernelspec(notebook, path):
    name = notebook["metadata"].get("kernelspec", {}).get("name")
    if name != "python3":
        yield f"the kernel is {name!r}, not 'python3'"


@rule
def header(notebook, path):
    first = notebook["cells"][0]
    title, *rest = paragraphs(text(first["source"]))
    if first["cell_type"] != "markdown" or not re.fullmatch(rf"# {path.stem[:2]} · \S.*", title):
        yield f"the first cell does not start with '# {path.stem[:2]} · Title': {title!r}"
    fields = [match and match[1] for match in (re.match(r"\*\*([^*]+)\*\* +\S", p) for p in rest)]
    if fields != FIELDS:
        yield f"the first cell's paragraphs are {fields}, not {FIELDS}"


@rule
def cell_length(notebook, path):
    for i, cell in cells(notebook, "code"):
        if (lines := len(text(cell["source"]).splitlines())) > 40:
            yield f"cell {i} has {lines} lines of code"


@rule
def display_math(notebook, path):
    """$$ inside a paragraph is misread by some renderers."""
    for i, cell in cells(notebook, "markdown"):
        for p in paragraphs(re.sub(r"(?m)^[ >]+", "", without_code(text(cell["source"])))):
            if "$$" in p and not re.fullmatch(r"\$\$[^$]+\$\$", p):
                yield f"cell {i}: $$ shares a paragraph: {p[:60]!r}"


@rule
def links(notebook, path):
    for i, cell in cells(notebook, "markdown"):
        yield from (f"cell {i}: {problem}" for problem in broken_links(text(cell["source"]), path))


@rule
def pictures_are_here(notebook, path):
    for i, cell in enumerate(notebook["cells"]):
        if cell.get("attachments"):
            yield f"cell {i} has an attachment"
        if cell["cell_type"] == "markdown" and (urls := remote_images(text(cell["source"]))):
            yield f"cell {i}: {urls} are not in the repository"


@rule
def figure_captions(notebook, path):
    for i, cell in cells(notebook, "code"):
        below = notebook["cells"][i + 1 : i + 2]
        if has_image(cell) and not any(text(c["source"]).startswith("**Figure.** ") for c in below):
            yield f"cell {i} draws a figure, and no cell starting with '**Figure.**' follows"


@rule
def closing(notebook, path):
    """What we checked (with a table of claims), Exercises, Next: the last cells, in this order."""
    titles = [text(cell["source"]).splitlines()[:1] for cell in notebook["cells"][-4:]]
    if titles != [["## What we checked"], titles[1], ["## Exercises"], ["## Next"]]:
        yield "the last cells are not '## What we checked', its table, '## Exercises' and '## Next'"
        return
    data = [out.get("data", {}) for out in notebook["cells"][-3].get("outputs", [])]
    tables = [text(d["text/markdown"]) for d in data if "text/markdown" in d]
    if not any(re.search(r"^\|[^\n]+\|\n\|[-|: ]+\|\n\|[^\n]+\|", table) for table in tables):
        yield "'What we checked' has no table of claims"


@rule
def reading_order(notebook, path):
    """Prerequisites are earlier notebooks that exist; Next leads to the following one."""
    names = sorted(p.name for p in path.parent.glob("[0-9][0-9]_*.ipynb"))
    earlier = {name[:2] for name in names[: names.index(path.name)]}
    first = text(notebook["cells"][0]["source"])
    wanted = set(re.findall(r"\b\d\d\b", "".join(re.findall(r"\*\*Prerequisites\*\*.*", first))))
    if not wanted <= earlier or bool(wanted) != bool(earlier):
        yield f"prerequisites are {sorted(wanted)}; the notebooks before this one are {sorted(earlier)}"
    for name in names[names.index(path.name) + 1 :][:1]:
        if f"]({name})" not in text(notebook["cells"][-1]["source"]):
            yield f"the last cell has no link to {name}"
