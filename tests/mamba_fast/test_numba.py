"""The numba room: kernels cached on disk and never stale, safe for two callers, threads change no bit."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import at_precision, outcome, weights_of
from scan_inputs import scan_inputs

import mamba_fast
from mamba_fast import selective_scan_fn

pytestmark = pytest.mark.numba

CALL = """
import torch
from mamba_fast import selective_scan_fn
from mamba_fast.ops.selective_scan.numba_forward import scan_forward
u = torch.randn(1, 3, 9)
selective_scan_fn(u, u.abs(), -torch.rand(3, 2), *torch.randn(2, 1, 2, 9), backend="numba")
print(sum(scan_forward.stats.cache_hits.values()))
"""


def hits_in_a_new_process(folder):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", CALL], capture_output=True, text=True, check=True, cwd=folder, env=environment
    )
    assert done.stderr == ""
    return int(done.stdout)


def test_a_kernel_is_compiled_once_and_forgotten_when_what_it_inlines_changes(tmp_path):
    package = Path(mamba_fast.__file__).parent
    shutil.copytree(package, tmp_path / "mamba_fast", ignore=shutil.ignore_patterns("__pycache__"))
    assert hits_in_a_new_process(tmp_path) == 0
    assert hits_in_a_new_process(tmp_path) == 1
    os.utime(tmp_path / "mamba_fast/ops/selective_scan/numba_math.py")
    assert hits_in_a_new_process(tmp_path) == 0


def test_two_python_threads_at_once():
    inputs = at_precision(scan_inputs(1, 2, 33, 70, 3), torch.float32)
    weights = weights_of(inputs)
    want = outcome(selective_scan_fn, inputs, weights, backend="numba")
    found = []

    def work():
        for _ in range(20):
            found.append(outcome(selective_scan_fn, inputs, weights, backend="numba"))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(torch.equal(got[name], want[name]) for got in found for name in want)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    inputs = at_precision(scan_inputs(2, 2, 70, 100, 3), torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(outcome(selective_scan_fn, inputs, weights_of(inputs), backend="numba"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
