"""One list of packages: pyproject.toml. What else names packages or Python versions agrees with it."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib
try:
    from rattler import MatchSpec  # conda's own grammar, where py-rattler is installed
except ImportError:
    MatchSpec = None

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
CLASSIFIER = re.compile(r"Programming Language :: Python :: (3\.\d+)")
PYTHONS = [m[1] for m in map(CLASSIFIER.fullmatch, PROJECT["classifiers"]) if m]
CARD = {"torch", "triton", "cuda-core", "numpy", "jupyterlab", "matplotlib", "einops", "nbval", "pytest"}
IMPORT_NAMES = {"pyyaml": "yaml", "cuda-core": "cuda", "lm-eval": "lm_eval", "pytest-xdist": "xdist"}


def requirements(*extras):
    """What `pip install -e .[extras]` asks for, extras of this project replaced by their contents."""
    rows = [*PROJECT["dependencies"], *(r for e in extras for r in PROJECT["optional-dependencies"][e])]
    for row in map(Requirement, rows):
        if row.name == PROJECT["name"]:
            yield from requirements(*row.extras)
        else:
            yield row


def constraints():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def applies(requirement, python):
    where = {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64"}
    return requirement.marker is None or requirement.marker.evaluate(where)


def conda_pip_lines():
    return next(row["pip"] for row in CONDA["dependencies"] if isinstance(row, dict))


def test_the_conda_environment_has_only_keys_that_conda_reads():
    assert list(CONDA) == ["name", "channels", "dependencies"]
    assert CONDA["name"] == PROJECT["name"]
    assert CONDA["channels"] == ["conda-forge"]
    assert [row for row in CONDA["dependencies"] if isinstance(row, dict)] == [{"pip": conda_pip_lines()}]


def test_conda_can_read_each_package():
    rows = [row for row in CONDA["dependencies"] if isinstance(row, str)]
    for row in rows:
        assert re.fullmatch(r"[a-z0-9_.-]+((>=|<=|==|=|<|>)\d+(\.\d+)*(,(>=|<=|<|>)\d+(\.\d+)*)*)?", row), row
        if MatchSpec is not None:
            MatchSpec(row, strict=True)
    assert [re.split("[<>=]", row)[0] for row in rows] == ["python", "pip"]


def test_every_list_of_python_versions_is_the_same():
    minors = [int(version.split(".")[1]) for version in PYTHONS]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"
    assert f"python>=3.{minors[0]},<3.{minors[-1] + 1}" in CONDA["dependencies"]
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS
    assert any(step.get("run") == "make test" for step in WORKFLOW["jobs"]["test"]["steps"])


def test_conda_installs_what_make_installs():
    extras = re.search(r"^EXTRAS := (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1]
    assert conda_pip_lines() == ["-c constraints.txt", f"-e .[{extras}]"]
    installed = {canonicalize_name(r.name) for r in requirements(*extras.split(","))}
    assert installed >= CARD


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_direct_dependency_once(python):
    pins = [r for r in constraints() if applies(r, python)]
    names = [canonicalize_name(r.name) for r in pins]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"==\d+(\.\d+)+", str(r.specifier)) for r in pins)
    versions = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in pins}
    for row in requirements(*PROJECT["optional-dependencies"]):
        if applies(row, python):
            assert versions[canonicalize_name(row.name)] in row.specifier, row


def test_constraints_pin_nothing_else():
    direct = {canonicalize_name(r.name) for r in requirements(*PROJECT["optional-dependencies"])}
    assert {canonicalize_name(r.name) for r in constraints()} == direct


@pytest.mark.parametrize(
    ("platform", "machine", "wanted"),
    [
        ("linux", "x86_64", {"triton", "cuda-core"}),
        ("linux", "aarch64", {"triton", "cuda-core"}),
        ("linux", "riscv64", set()),
        ("darwin", "arm64", set()),
        ("darwin", "x86_64", set()),
        ("win32", "AMD64", {"cuda-core"}),
        ("win32", "ARM64", set()),
    ],
)
@pytest.mark.parametrize("extra", ["triton", "cuda", "cuda12"])
def test_gpu_libraries_are_asked_for_where_they_exist(platform, machine, wanted, extra):
    (row,) = map(Requirement, PROJECT["optional-dependencies"][extra])
    asked = row.marker.evaluate({"sys_platform": platform, "platform_machine": machine})
    assert asked is (row.name in wanted)


def test_plain_install_asks_for_what_every_platform_has():
    assert {r.name for r in requirements()} & {"triton", "numba", "cuda-core"} == set()
    assert all(r.marker is None for r in requirements())


def test_every_import_is_declared():
    names = {canonicalize_name(r.name) for r in requirements(*PROJECT["optional-dependencies"])}
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    own = {"mamba_ref", "mamba_fast", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    known = declared | own | sys.stdlib_module_names | {"tomllib", "rattler"}  # the last two: this file alone
    for path in [p for folder in ("mamba_ref", "mamba_fast", "tests") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module]
            assert {name.split(".")[0] for name in found} <= known, path
