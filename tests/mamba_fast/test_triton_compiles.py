"""The Triton kernels as a GPU gets them: compiled for real architectures at real block sizes, without one."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

ARCHITECTURES = (80, 90, 100)
TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
ENVIRONMENT = {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}


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
    kernels = ("update_kernel", "norm_forward_kernel", "norm_backward_kernel", "sum_parts_kernel")
    kernels += ("conv_rows_kernel", "conv_columns_kernel", "conv_rows_backward_kernel", "reach_kernel")
    kernels += (
        "conv_columns_backward_kernel",
        "conv_parts_kernel",
        "conv_update_kernel",
        "conv_states_kernel",
        "greedy_token_kernel",
        "cross_entropy_kernel",
    )
    wanted |= {(k, t, "none") for k in kernels for t in ("fp32", "bf16")}
    wanted |= {(f"{k}_kernel", "bf16", "none") for k in ("norm", "product", "recur", "conv_token")}
    assert wanted <= compiled


def allowed():
    """{(kernel, architecture): bytes a thread} in the documentation, for the installed Triton."""
    version = ".".join(importlib.metadata.version("triton").split(".")[:2])
    pages = [ROOT / "docs" / "kernels.md", *(ROOT / "mamba_fast" / "ops").glob("*/README.md")]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    cells = re.findall(r"^\| ([\d.]+) \| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    table = {
        (k, a): int(x) for v, k, *xs in cells if v == version for a, x in zip(ARCHITECTURES, xs, strict=True)
    }
    if not table:
        pytest.skip(f"the documentation has no spills of Triton {version}: each brings its own compiler")
    return table


def test_no_kernel_spills_more_than_the_documentation_says(rows):
    """A spilled register is a number that travels to local memory and back at every use.

    A kernel that no table names spills nothing.
    """
    table = allowed()
    assert table.keys() <= {(r["kernel"], r["arch"]) for r in rows}
    above = [str(r) for r in rows if r["spilled"] > table.get((r["kernel"], r["arch"]), 0)]
    assert above == [], "\n".join(above)
