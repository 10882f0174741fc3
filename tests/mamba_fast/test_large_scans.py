"""Sizes past what 32 bits count, past the lengths and widths of published models; small ones without a GPU.

Every kernel of a case is compared with float64 where the benchmark compares it: on a few channels at every
token, and on all channels at the first and the last tokens, gradients too.
"""

import pytest
import torch

from mamba_fast.bench import checks
from mamba_fast.bench.scan import ours, scan_case

GPU = torch.device("cuda")
SIZES = {"elements": (2, 1056, 2**20, 16), "channels": (1, 70_000, 2048, 16), "tokens": (1, 64, 2**20, 16)}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SIZES)
def test_large_on_a_gpu(name):
    batch, channels, seqlen, _ = shape = SIZES[name]
    if torch.cuda.get_device_properties(GPU).total_memory < 32 * batch * channels * seqlen:
        pytest.skip("not enough memory")
    found = checks.check(scan_case(name, shape, torch.bfloat16, GPU, ours(GPU)))
    assert found.keys() == {"cuda", "triton"}


def test_the_large_sizes_are_past_32_bits_and_the_published_shapes():
    batch, channels, seqlen, _ = SIZES["elements"]
    assert batch * channels * seqlen > 2**31
    assert SIZES["tokens"][2] >= 1_048_576
    assert SIZES["channels"][1] >= 70_000


@pytest.mark.numba
def test_the_same_comparison_at_a_small_size():
    cpu = torch.device("cpu")
    found = checks.check(scan_case("small", (2, 20, 300, 16), torch.float32, cpu, ours(cpu)))
    assert set(found["numba"]) >= {"y", "du", "dA", "dB", "dC", "dD", "dz"}
