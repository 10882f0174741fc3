"""The suite notices every bug of tests/mutants.py: each runs for real, in a copy of the sources."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, table

ROOT = Path(__file__).parent.parent
DIFFERENCE = ("AssertionError", "GradcheckError", "Failed")  # a result was compared; the code did not crash
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="one process a mutant, by fork")


def parameters(named):
    """One parameter for each (id, value, backend), skipped where the backend's library is missing."""
    marks = {name: [getattr(pytest.mark, name)] for name in ("numba", "triton")}
    return [pytest.param(value, id=label, marks=marks.get(backend, [])) for label, value, backend in named]


EVERY_MUTANT = parameters((f"{m.backend}: {m.name}", m, m.backend) for m in MUTANTS)
EVERY_CHECK = parameters(sorted({(m.check, m.check, m.backend) for m in MUTANTS}))


@pytest.fixture(scope="module")
def verdicts():
    """How each check ended: by (index of the mutant, or None for the sources as they are; check)."""
    command = [sys.executable, ROOT / "tests" / "run_mutants.py"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return {(index, check): (ended, said) for index, check, ended, said in rows}


def verdict_on_the_sources(verdicts, check):
    """How the check ends on the sources as they are; skipped with it where this machine lacks something."""
    ended, said = verdicts[None, check]
    if ended == "skipped":
        pytest.skip(said)
    return ended, said


@needs_fork
@pytest.mark.parametrize("check", EVERY_CHECK)
def test_the_sources_as_they_are_pass(verdicts, check):
    assert verdict_on_the_sources(verdicts, check) == ("passed", "")


@needs_fork
@pytest.mark.parametrize("mutant", EVERY_MUTANT)
def test_no_mutant_survives(verdicts, mutant):
    verdict_on_the_sources(verdicts, mutant.check)
    ended, said = verdicts[MUTANTS.index(mutant), mutant.check]
    assert ended in DIFFERENCE, f"{ended}: {said}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.backend}: {m.name}")
def test_what_a_mutant_breaks_is_there_exactly_once(mutant):
    assert (ROOT / mutant.file).read_text("utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old


def test_every_backend_and_the_reference_are_broken():
    count = {name: sum(m.backend == name for m in MUTANTS) for name in {m.backend for m in MUTANTS}}
    assert len(MUTANTS) >= 18
    assert all(count[name] >= 5 for name in ("torch", "numba", "triton", "reference")), count
    assert len({(m.backend, m.name) for m in MUTANTS}) == len(MUTANTS)


def test_the_documentation_lists_them():
    page = (ROOT / "docs" / "mutants.md").read_text("utf-8")
    assert table() in page, "its table is not what python tests/mutants.py prints"
