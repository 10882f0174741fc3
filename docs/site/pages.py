"""The pages that are made: the front page, and one for every result. Each list is by glob."""

import json

import nbformat

from mamba_fast.bench import readme

USE = ("README", *(f"docs/{name}" for name in (
    "installing", "model", "generation", "training", "evaluation", "compat", "scaling")))  # fmt: skip
UNDERSTAND = ("docs/notation", "docs/numerics", "docs/kernels", "docs/kernels_cpu")
TITLES = {"README": "Overview"}
PARTS = {
    "Learn": "One question a notebook, in this order. All of them run on a CPU.",
    "Use": "Install it, call it, build a model of it.",
    "Understand": "One name for each thing, what is rounded, who holds what in which memory, the derivation "
    "of each op, and how all of it is tested.",
    "Results": "What was measured, on which machine, with its figures.",
    "API": "Every public name.",
}


def write(source):
    """Write the generated pages into the staged tree `source`."""
    for path in sorted((source / "docs" / "results").glob("*.json")):
        path.with_suffix(".md").write_text(result(path), "utf-8")
    (source / "index.md").write_text(front(source), "utf-8")


def front(source):
    """README up to its first section, then a table of contents for each part."""

    def found(pattern):
        return [path.relative_to(source).with_suffix("").as_posix() for path in sorted(source.glob(pattern))]

    pages = [*found("*.md"), *found("docs/*.md")]
    first = [page for page in UNDERSTAND if page in pages]
    other = [page for page in pages if page not in (*USE, *UNDERSTAND, "index")]
    entries = {
        "Learn": found("notebooks/*.ipynb"),
        "Use": [page for page in USE if page in pages],
        "Understand": [*first, *found("mamba_fast/ops/*/README.md"), *other],
        "Results": found("docs/results/*.md"),
        "API": ["api/mamba_fast", "api/mamba_ref"],
    }
    text = [(source / "README.md").read_text("utf-8").split("\n## ", 1)[0]]
    for part, names in entries.items():
        text += [f"## {part}", PARTS[part]]
        if part == "Learn":
            text.append(questions(source, names))
        text.append(toctree(part, names, hidden=part == "Learn"))
    return "\n\n".join(text) + "\n"


def toctree(part, names, hidden):
    lines = [f"{TITLES[name]} <{name}>" if name in TITLES else name for name in names]
    options = [f":caption: {part}", ":maxdepth: 1", *[":hidden:"] * hidden]
    return "\n".join(["```{toctree}", *options, "", *lines, "```"])


def questions(source, names):
    """A table of notebooks: what each is called and what it asks."""
    rows = ["| notebook | question |", "|---|---|"]
    for name in names:
        header = nbformat.read(source / f"{name}.ipynb", as_version=4).cells[0].source
        asked = next(line for line in header.splitlines() if line.startswith("**Question**"))
        rows.append(f"| [](/{name}.ipynb) | {asked.removeprefix('**Question** ')} |")
    return "\n".join(rows)


def result(path):
    """The page of one result: its figure, what was found, where it was measured, and every number."""
    facts = json.loads(path.read_text("utf-8"))
    title = (
        f"{facts.get('bench', path.stem.split('-')[0])}, {facts['device']}"
        if "device" in facts
        else path.stem
    )
    text = [f"# {title}"]
    if path.with_suffix(".png").exists():
        text.append(f"![{path.stem}]({path.stem}.png)")
    for name, value in facts.items():
        if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
            text += [f"## {name.capitalize()}", "\n".join(f"- {entry}" for entry in value)]
    plain = {name: value for name, value in facts.items() if not isinstance(value, (list, dict, type(None)))}
    text += [
        "## Where",
        readme.markdown(("", ""), [(name, readme.shown(value)) for name, value in plain.items()]),
    ]
    for name, value in facts.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            text += [f"## {name.capitalize()}", readme.table(value, path.stem.split("-")[0])]
            text += [readme.BRACKETS] * readme.timed(value)
    return "\n\n".join([*text, f"All of it: [{path.name}]({path.name})"]) + "\n"
