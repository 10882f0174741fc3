"""The machine instructions of an innermost loop, counted in kernels whose counts are known."""

import math

import pytest
import torch

pytest.importorskip("triton")  # brings the disassembler

from mamba_fast import nvrtc
from mamba_fast.ladder import machine_code
from mamba_fast.ops.selective_scan import cuda_plan

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="cuda-core is not installed")
SOURCE = """
extern "C" __global__ void k(float *x, int n) {
  float a = x[threadIdx.x], e = exp2f(a);
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    %s
  }
  x[threadIdx.x] = a + e;
}
"""
EXP = 'asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(a));'
SHUFFLE = "a = __shfl_xor_sync(~0u, a, 1);"
FUSED = "a = fmaf(a, e, e);"


@pytest.fixture
def loop(tmp_path):
    def loop(body, arch="sm_90"):
        path = tmp_path / "k.cu"
        path.write_text(SOURCE % body)
        return machine_code.loop(nvrtc.compile_cubin([path], {}, arch))

    return loop


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_what_a_loop_does_is_counted_by_kind(loop, arch):
    found = loop(3 * EXP + 2 * SHUFFLE + 4 * FUSED, arch)
    assert found.pop("rest") > 0  # the counter and the jump
    assert found == {"exponentials": 3, "shuffles": 2, "float32": 4}


def test_a_loop_without_an_exponential_is_not_the_one(loop):
    assert loop(FUSED + SHUFFLE) is None


def test_of_two_loops_the_inner_one_is_counted(loop):
    inner = "for (int k = 0; k < n; k++) {" + EXP + "}"
    found = loop(f"{4 * FUSED}\n#pragma unroll 1\n{inner}\n{5 * EXP}")
    assert (found["exponentials"], found.get("float32")) == (1, None)


@pytest.mark.parametrize("rows", [8192, 3072])
def test_the_forward_scan_takes_the_work_that_its_page_counts(rows):
    """docs/kernels.md: one exponential and five float32 instructions an update, and the scan over lanes."""
    cpu, meta = torch.device("cpu"), torch.device("meta")
    cut = cuda_plan.cut_forward((1, rows, 2048, rows, cpu))
    u, B = torch.empty(1, rows, 2048, device=meta), torch.empty(1, 1, 16, 2048, device=meta)
    macros = cuda_plan.defines(
        cut, torch.bfloat16, 16, B, B, u, True, False, True, False, wide=(True, True, True)
    )
    found = machine_code.loop(nvrtc.compile_cubin(cuda_plan.SOURCES["scan_forward"], macros, "sm_90"))
    assert found["exponentials"] == cut.unroll * (cut.steps + 1)  # one more for a lane's whole decay
    assert found["shuffles"] == cut.unroll * 2 * math.log2(cut.lanes)
    assert 5 <= found["float32"] / (cut.unroll * cut.steps) < 6
