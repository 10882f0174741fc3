"""The Triton kernels as a GPU gets them: compiled for real architectures at real block sizes, without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

ARCHITECTURES = (80, 90, 100)
TESTS = Path(__file__).parents[1]
ENVIRONMENT = {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}


@pytest.fixture(scope="module")
def rows():
    """One row a kernel. The program calls the backend itself: block sizes stand in one place."""
    command = [sys.executable, TESTS / "compile_ahead.py", *map(str, ARCHITECTURES)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles(rows, arch):
    compiled = {(r["kernel"], r["dtype"], r["packing"]) for r in rows if r["arch"] == arch}
    kernels = ("scan_forward_kernel", "tile_summary_kernel", "chain_kernel", "scan_backward_kernel")
    wanted = {(k, t, p) for k in kernels for t in ("fp32", "bf16") for p in ("none", "cu_seqlens")}
    assert wanted <= compiled


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(rows, arch):
    """A spilled register is a state that travels to memory and back at every step."""
    spilled = [str(r) for r in rows if r["arch"] == arch and r["spilled"]]
    assert spilled == [], "\n".join(spilled)
