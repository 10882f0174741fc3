"""Break a copy of the sources in one way after another, and say for each what its test makes of it.

    python tests/run_mutants.py

prints one JSON object a line: a mutant's index in `mutants.MUTANTS`, or null for the copy as it is;
the check; what it ended in; and the last line of its report. The check is a real test, run by pytest.

A child process a mutant: torch, numba and Triton are imported once, before the fork, and the two
packages inside it. numba's kernels run as plain Python (NUMBA_DISABLE_JIT), because compiling them
would take most of an hour, and Triton's through its interpreter.
"""

import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "NUMBA_DISABLE_JIT": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}  # fmt: skip
LIBRARIES = ("numpy", "torch", "numba", "triton", "triton.language", "pytest", "hypothesis", "einops")
SECONDS = 60  # a mutant may never end


class Recorder:
    """The pytest plugin that notes how each test ended."""

    def __init__(self, folder):
        self.folder, self.outcomes = folder, []

    def pytest_sessionstart(self):
        """numba's bit cast exists for its compiler alone; as Python it is this view."""
        if importlib.util.find_spec("numba"):
            numba_math = importlib.import_module("mamba_fast.ops.selective_scan.numba_math")
            numba_math._float_from_bits = lambda bits: bits.view("float32")

    def pytest_runtest_makereport(self, item, call):
        skipped = call.excinfo and call.excinfo.typename == "Skipped"
        if call.when == "call" or call.excinfo:
            ended = "skipped" if skipped else call.excinfo.typename if call.excinfo else "passed"
            said = str(call.excinfo.value).splitlines() if call.excinfo else []
            lines = [line for line in said if "FAIL" in line] or said
            self.outcomes.append((item.nodeid, ended, "; ".join(lines)[:400]))

    def pytest_sessionfinish(self):
        for name in ("mamba_ref", "mamba_fast"):
            module = sys.modules.get(name)
            assert module is None or Path(module.__file__).is_relative_to(self.folder), module
        Path("outcomes.json").write_text(json.dumps(self.outcomes))


def copied(folder):
    """What the tests need of the repository: both packages, the tests, and pytest's settings."""
    for name in ("mamba_ref", "mamba_fast", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def outcomes(folder, checks):
    """(check, outcome, message) of every check, run in a child process inside the folder."""
    report = folder / "outcomes.json"
    report.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        import pytest

        signal.alarm(SECONDS)
        os.chdir(folder)
        with open("output.txt", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            arguments = ["-q", "--tb=no", "-p", "no:cacheprovider", *(f"tests/{check}" for check in checks)]
            pytest.main(arguments, plugins=[Recorder(folder)])
        os._exit(0)
    os.waitpid(child, 0)
    found = {}
    for node, ended, said in json.loads(report.read_text()) if report.exists() else ():
        found[node.removeprefix("tests/")] = ended, said
    lost = (folder / "output.txt").read_text()[-400:] if len(found) < len(checks) else ""
    return [(check, *found.get(check, ("lost", lost))) for check in checks]


def main():
    from mutants import MUTANTS

    sys.path.remove(str(ROOT / "tests"))  # tests/mamba_ref is no package of that name
    for library in LIBRARIES:
        if importlib.util.find_spec(library.split(".")[0]):
            importlib.import_module(library)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copied(folder)
        for row in outcomes(folder, sorted({mutant.check for mutant in MUTANTS})):
            print(json.dumps([None, *row]), flush=True)
        for index, mutant in enumerate(MUTANTS):
            path = folder / mutant.file
            source = path.read_text("utf-8")
            path.write_text(source.replace(mutant.old, mutant.new), "utf-8")
            for row in outcomes(folder, [mutant.check]):
                print(json.dumps([index, *row]), flush=True)
            path.write_text(source, "utf-8")


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    sys.dont_write_bytecode = True
    main()
