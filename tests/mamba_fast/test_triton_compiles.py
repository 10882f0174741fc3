"""The Triton kernels as a GPU gets them: compiled for real architectures, at real block sizes, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

ARCHITECTURES = (80, 90, 100)
PROGRAM = Path(__file__).parents[1] / "compile_ahead.py"


@pytest.fixture(scope="module")
def rows():
    """One row a compiled kernel. The program calls the backend itself: nothing here repeats its block sizes."""
    command = [sys.executable, PROGRAM, *map(str, ARCHITECTURES)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
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
