"""Every relative link of the Markdown files leads somewhere."""

from pathlib import Path

import pytest
from markdown_links import broken_links, remote_images, targets

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "mamba_ref", "mamba_fast", "notebooks")
FILES = [*ROOT.glob("*.md"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.md"))]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in FILES if "_build" not in p.parts)


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page):
    text = (ROOT / page).read_text("utf-8")
    assert list(broken_links(text, ROOT / page)) == []
    assert remote_images(text) == []


def test_links_are_told_from_code_and_formulas():
    markdown = (
        "[one](a.md#top), ![two](b.png \"title\") and <img width=\"9\" src=\"c.png\"> but `[no](x)`,\n"
        "$M[t](s)$ and\n\n$$h[0](t)$$\n\n```python\nf[0](y)\n```\n\n[three](<d.md>)"
    )  # fmt: skip
    assert targets(markdown) == ["a.md#top", "b.png", "c.png", "d.md"]


def test_broken_links_are_seen(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# Δ, and what `A_bar` is\n\n```\n# not a heading\n```\n", "utf-8")
    page.write_text("## Here\n", "utf-8")
    good = "[a](other.md) [b](other.md#δ-and-what-a_bar-is) [c](#here) [d](https://example.org/x) [e](../)"
    assert list(broken_links(good, page)) == []
    bad = "[a](missing.md) [b](other.md#not-a-heading) [c](#there) [d](/etc)"
    assert len(list(broken_links(bad, page))) == 4
    assert remote_images("![a](https://example.org/a.png) ![b](here.png)") == ["https://example.org/a.png"]
