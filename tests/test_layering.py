"""What imports what, what an import may need, and how large a file or a function may grow."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"mamba_ref": {"mamba_fast", "triton"}, "mamba_fast": {"mamba_ref"}}
SOURCES = sorted(p for package in FORBIDDEN for p in (ROOT / package).rglob("*.py"))
KERNELS = sorted((ROOT / "mamba_fast").rglob("*.cu*"))
TEXT = {".py", ".cu", ".cuh", ".md", ".ipynb", ".toml", ".txt", ".yml", ".cfg"}

# An import may fail without its library in these rooms alone.
ROOMS = re.compile(
    r"mamba_fast\.ops\.(\w+\.)?(triton|numba)_\w+|mamba_fast\.ladder\.(common|k\d_\w+)|mamba_ref\.plots(_\w+)?"
    r"|mamba_fast\.harness_model"
)
LIBRARIES = ("triton", "numba", "llvmlite", "cuda", "matplotlib", "transformers", "safetensors", "lm_eval")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def module(path):
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(source):
    """The top-level package and the line of every import, also inside functions and by import_module."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                names = [str(node.args[0].value)]
        yield from ((name.split(".")[0], node.lineno) for name in names)


def long_functions(source, limit):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, functions) and node.end_lineno - node.lineno + 1 >= limit:
            yield f"{node.name}: {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_the_packages_never_import_each_other(path):
    forbidden = FORBIDDEN[path.relative_to(ROOT).parts[0]]
    assert [(name, line) for name, line in imports(path.read_text("utf-8")) if name in forbidden] == []


def test_every_form_of_import_is_seen():
    source = (
        "import triton.language as tl\n"
        "def f():\n"
        "    from mamba_fast.ops import scan\n"
        "    importlib.import_module('mamba_ref.checks')\n"
        "from . import sibling\n"
        "print('mamba_fast')\n"
    )
    assert sorted(imports(source)) == [("mamba_fast", 3), ("mamba_ref", 4), ("triton", 1)]


def refused(modules):
    """Those of `modules` that raise ImportError in a fresh interpreter without any of LIBRARIES."""
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({LIBRARIES!r}))\n"
        f"for name in {modules!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError:\n"
        "        print(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_an_import_fails_for_a_missing_library_in_its_room_alone():
    modules = [module(path) for path in SOURCES]
    rooms = [name for name in modules if ROOMS.fullmatch(name)]
    assert {"mamba_ref", "mamba_fast", "mamba_ref.compare", "mamba_fast.ladder"} <= set(modules) - set(rooms)
    assert refused(modules) == rooms


@pytest.mark.parametrize("path", [*SOURCES, *KERNELS], ids=relative)
def test_a_file_has_fewer_than_300_lines(path):
    assert len(path.read_text("utf-8").splitlines()) < 300


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_function_has_fewer_than_60_lines(path):
    assert list(long_functions(path.read_text("utf-8"), 60)) == []


def test_a_long_function_is_seen():
    source = "class A:\n    def short(self):\n        pass\n    def long(self):\n" + "        pass\n" * 3
    assert list(long_functions(source, 4)) == ["long: 4 lines"]


def test_nothing_is_left_for_later():
    later = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b")
    folders = [ROOT / name for name in ("mamba_ref", "mamba_fast", "tests", "notebooks", "docs")]
    files = [p for folder in folders for p in folder.rglob("*")] + list(ROOT.glob("*"))
    texts = [p for p in files if p.suffix in TEXT and ".ipynb_checkpoints" not in p.parts]
    assert len(texts) > len(SOURCES)
    found = {relative(p): later.findall(p.read_text("utf-8")) for p in texts}
    assert {name: words for name, words in found.items() if words} == {}
