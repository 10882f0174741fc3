"""The kernel of a whole step as a GPU gets it: compiled by NVRTC, without one."""

import re
from pathlib import Path

import pytest
import torch

from mamba_fast import nvrtc
from mamba_fast.ops.model_step import LayerWeights, Weights, cuda_step

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="cuda-core is not installed")
SHARED = {90: 227, 100: 227, 120: 99}  # KiB that a block may have, by architecture
SIZES = {"130m": (768, 24, 48), "2.8b": (2560, 64, 160)}  # d_model, layers, dt_rank
README = Path(cuda_step.__file__).with_name("README.md").read_text("utf-8")
VERSION = ".".join(map(str, nvrtc._nvrtc_version())) if nvrtc.available() else ""
ROWS = re.findall(rf"^\| {re.escape(VERSION)} \| (\w\S+), (\d) \| (\S+) \| (\S+) \| (\S+) \|$", README, re.M)


def published(name):
    d_model, layer_count, dt_rank = SIZES[name]
    d_inner = 2 * d_model

    def empty(*shape, dtype=torch.float16):
        return torch.empty(shape, dtype=dtype, device="meta")

    single = {"dtype": torch.float32}
    layer = LayerWeights(
        empty(d_model), empty(2 * d_inner, d_model), empty(d_inner, 4), empty(d_inner),
        empty(dt_rank + 32, d_inner), empty(d_inner, dt_rank), empty(d_inner), empty(d_inner, 16, **single),
        empty(d_inner, **single), empty(d_model, d_inner),
    )  # fmt: skip
    head = empty(50280, d_model)
    return Weights((layer,) * layer_count, head, empty(d_model), head, 1e-5)


@pytest.mark.skipif(not ROWS, reason=f"no numbers of NVRTC {VERSION}: each brings its own compiler")
@pytest.mark.parametrize("name, batch, spills", [(n, int(b), counts) for n, b, *counts in ROWS])
def test_registers_and_spills_are_those_of_the_table(name, batch, spills):
    for (arch, limit), allowed in zip(SHARED.items(), spills, strict=True):
        macros = cuda_step.macros_for(published(name), batch, 4, False, 132)
        macros["RING"] = cuda_step.ring_for(macros, 1024 * limit)
        assert cuda_step.fits(macros) == (allowed != "-"), (arch, macros["RING"])
        if allowed != "-":
            cubin = nvrtc.compile_cubin(cuda_step.SOURCES, macros, f"sm_{arch}")
            found = nvrtc.registers_and_spills(cubin)["model_step"]
            assert found["registers"] <= 128, (arch, found)
            assert found["spilled"] <= int(allowed), (arch, found)
