"""Build the documentation as a site that needs no server and no network.

    python docs/site/build.py [FOLDER]

FOLDER/html is the site (default: out/site/html). A warning is an error.
"""

import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import api  # noqa: E402
import pages  # noqa: E402

PAGES = ("*.md", "docs/*.md", "docs/*.png", "docs/results/*.*", "notebooks/*.ipynb", "mamba_fast/**/*.md")
LINKED = ("*.cff", "*.yml", "docs/*.py", *(f"mamba_*/**/*.{kind}" for kind in ("py", "cu", "cuh")))


def main(folder):
    source = folder / "source"
    stage(source)
    options = ["-W", "--keep-going", "-q", "-c", HERE, "-d", folder / "doctrees", "-b", "html"]
    return sphinx([str(option) for option in (*options, source, folder / "html")])


def stage(source):
    """Copy what becomes a page, and what pages link to, where relative links find it; add what is made."""
    shutil.rmtree(source, ignore_errors=True)
    for path in [path for pattern in (*PAGES, *LINKED) for path in sorted(ROOT.glob(pattern))]:
        to = source / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, to)
    pages.write(source)
    api.write(source / "api")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "out" / "site"))
