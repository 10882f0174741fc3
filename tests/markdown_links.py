"""Links in Markdown: what they lead to, and whether it is there."""

import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

FENCED = re.compile(r"(?ms)^[ >]*(`{3,}|~{3,}).*?^[ >]*\1[`~]*\s*?$")
INLINE = r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)"
LINK = re.compile(rf"!?{INLINE}|<(?:a|img)\b[^>]*?(?:href|src)=\"([^\"]+)\"")
IMAGE = re.compile(rf"!{INLINE}|<img\b[^>]*?src=\"([^\"]+)\"")


def without_code(markdown):
    """The text without fenced blocks and code spans, in which nothing is a link or a formula."""
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(FENCED, "", markdown))


def prose(markdown):
    """The text without code and formulas."""
    markdown = re.sub(r"(?s)\$\$.*?\$\$", "", without_code(markdown))
    return re.sub(r"\$[^$\n]+\$", "", markdown)


def targets(markdown, pattern=LINK):
    return [first or second for first, second in pattern.findall(prose(markdown))]


def remote_images(markdown):
    return [target for target in targets(markdown, IMAGE) if urlsplit(target).scheme]


def anchors(path):
    """The anchors that the headings of a Markdown file or notebook make."""
    markdown = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = [c for c in json.loads(markdown)["cells"] if c["cell_type"] == "markdown"]
        markdown = "\n\n".join("".join(c["source"]) for c in cells)
    titles = re.findall(r"(?m)^#{1,6}\s+(.+?)\s*#*$", re.sub(FENCED, "", markdown))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(markdown, path):
    """What is wrong with the relative links of `markdown`, which stands in the file `path`."""
    for target in targets(markdown):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        file = Path(path).parent / unquote(parts.path) if parts.path else Path(path)
        if parts.path.startswith("/") or not file.exists():
            yield f"{target} does not exist"
        elif parts.fragment and parts.fragment.lower() not in anchors(file):
            yield f"{target}: no heading makes this anchor"
