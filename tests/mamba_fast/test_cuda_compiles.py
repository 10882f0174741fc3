"""The CUDA kernels as a GPU gets them: compiled by NVRTC for real architectures, without one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_fast import nvrtc

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="cuda-core is not installed")
ARCHITECTURES = (80, 90, 100, 120)
TESTS = Path(__file__).parents[1]
ROW = r"^\| ([\d.]+) \| `(\w+)` \| (\d+|-) \| (\d+|-) \| (\d+|-) \| (\d+|-) \| (\d+|-) \|$"


@pytest.fixture(scope="module")
def rows():
    """One row a kernel. The program calls the backend itself: sizes stand in one place."""
    command = [sys.executable, TESTS / "compile_cuda.py", *map(str, ARCHITECTURES)]
    path = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | path)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles(rows, arch):
    compiled = {(r["kernel"], r["dtype"], r["packing"]) for r in rows if r["arch"] == arch}
    kernels = ("scan_forward", "scan_backward", "scan_summary", "scan_chain")
    wanted = {(k, t, p) for k in kernels for t in ("float32", "bfloat16") for p in ("none", "cu_seqlens")}
    assert wanted <= compiled


def documented():
    """{(kernel, lanes, architecture): registers} in docs/kernels.md, for this NVRTC."""
    version = ".".join(map(str, nvrtc._nvrtc_version()))
    page = (TESTS.parent / "docs" / "kernels.md").read_text("utf-8")
    cells = [c for c in re.findall(ROW, page, re.MULTILINE) if c[0] == version]
    if not cells:
        pytest.skip(f"docs/kernels.md has no registers of NVRTC {version}: each brings its own compiler")
    pairs = ((kernel, lanes, zip(ARCHITECTURES, counts, strict=True)) for _, kernel, lanes, *counts in cells)
    return {(kernel, lanes, arch): int(n) for kernel, lanes, row in pairs for arch, n in row if n != "-"}


def test_no_kernel_spills(rows):
    """By whatever NVRTC is installed: seen with 13.0 and 13.5."""
    assert [str(r) for r in rows if r["spilled"]] == []


def test_none_takes_more_registers_than_the_documentation_says(rows):
    table = documented()
    found = {(r["kernel"], str(r.get("lanes", "-")), r["arch"]) for r in rows}
    assert table.keys() == found
    above = [str(r) for r in rows if r["registers"] > table[r["kernel"], str(r.get("lanes", "-")), r["arch"]]]
    assert above == [], "\n".join(above)
