"""Compile the CUDA kernels of real calls for real architectures, without a GPU, and print what each needs.

    PYTHONPATH=.:tests python tests/compile_cuda.py 80 90 100 120

calls the cuda backend as `selective_scan_fn` does, with every launch replaced by a note of its source and
macros, and compiles each of them with NVRTC. Prints one JSON object a kernel: registers a thread, bytes
spilled a thread, bytes of SRAM a block.
"""

import json
import sys
from typing import ClassVar

import torch
from cases import at_precision
from scan_inputs import scan_inputs

from mamba_fast import nvrtc
from mamba_fast.nvrtc_cubin import registers_and_spills
from mamba_fast.ops.selective_scan import cuda_plan, cuda_scan
from mamba_fast.ops.selective_scan.arguments import normalise

ORDER = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")
PACKINGS = {
    "none": lambda length: {},
    "seq_idx": lambda length: {"seq_idx": torch.arange(length)[None] // 700},
    "cu_seqlens": lambda length: {"cu_seqlens": torch.tensor([0, length // 3, length])},
}
SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KB a block may have
# (channels, tokens) that take every row of the tables in cuda_plan, the last one cut into stretches
SIZES = (
    (12288, 2048), (6144, 2048), (4608, 2048), (4096, 2048), (3456, 2048), (3072, 2048), (1536, 2048),
    (1024, 1024), (512, 2048), (256, 2048), (128, 2048), (512, 600), (512, 256), (512, 100), (4, 40000),
)  # fmt: skip


class Noted:
    """Takes the place of nvrtc.Kernel: launches nothing, remembers what would be compiled."""

    calls: ClassVar[dict] = {}

    def launch(self, *args, early):
        pass

    @classmethod
    def load(cls, sources, defines, entry, shared_bytes=0, device=None):
        cls.calls[entry, tuple(sorted(defines.items()))] = (sources, defines, entry, shared_bytes)
        return cls()


def note_calls(dtype, d_state, packing, channels, seqlen):
    """Every kernel of a forward and a backward with every option on."""
    inputs = at_precision(scan_inputs(0, 1, 4, 29, d_state, initial_state=False), dtype)
    meta = {}
    for name, v in inputs.items():
        if isinstance(v, torch.Tensor):
            shape = [{4: channels, 29: seqlen}.get(n, n) for n in v.shape]
            v = (
                v.new_zeros(1).expand(shape)
                if name in ("A", "D", "delta_bias")
                else v.new_empty(shape, device="meta")
            )
        meta[name] = v
    for name in ("A", "D", "delta_bias"):
        meta[name] = meta[name].to("meta")
    args = normalise(*(meta.get(k) for k in ORDER), None, None)
    small = at_precision(scan_inputs(0, 1, 2, seqlen, d_state, initial_state=False), dtype)
    packed = PACKINGS[packing](seqlen)
    extra = normalise(*(small.get(k) for k in ORDER), packed.get("seq_idx"), packed.get("cu_seqlens"))
    args = args._replace(seq=extra.seq, varlen=extra.varlen, rows=extra.rows)
    y, last, states = cuda_scan.forward(*args, True)
    *tensors, state, seq, softplus, varlen, rows = args
    for ordered in (False, True):
        cuda_scan.backward(y, last, *tensors, seq, softplus, varlen, rows, states, state, ordered)


def cases():
    for dtype in (torch.float32, torch.bfloat16):
        for channels, seqlen in SIZES:
            yield from ((dtype, 16, packing, channels, seqlen) for packing in PACKINGS)
        for d_state in (1, 8, 100, 128, 256):
            yield dtype, d_state, "none", 8192, 2048
        for channels in (12288, 3072, 1024):
            yield from ((dtype, d_state, "none", channels, 2048) for d_state in (24, 64))
            yield from ((dtype, 64, packing, channels, 2048) for packing in ("seq_idx", "cu_seqlens"))
    yield torch.float16, 16, "none", 8192, 2048


def compile_calls(case, arch, compiled):
    """A line for each kernel of the calls of a case, as a chip of that architecture makes them."""
    cuda_plan.shared_limit = lambda device: SHARED[arch] * 1024
    cuda_plan.capability = lambda device: divmod(arch, 10)
    Noted.calls.clear()
    cuda_scan._forward_calls.cache_clear()
    cuda_scan._backward_calls.cache_clear()
    note_calls(*case)
    for key, (sources, defines, entry, shared) in Noted.calls.items():
        if (key, arch) not in compiled:
            cubin = nvrtc.compile_cubin(sources, defines, f"sm_{arch}")
            compiled[key, arch] = registers_and_spills(cubin)[entry]
        names = ("lanes", "steps") if entry != "scan_chain" else ()
        label = {"arch": arch, "kernel": entry} | {k: defines[k.upper()] for k in names}
        label |= {"dtype": str(case[0]).removeprefix("torch."), "d_state": case[1], "packing": case[2]}
        print(json.dumps(label | compiled[key, arch] | {"sram": shared}), flush=True)


def main(architectures):
    nvrtc.Kernel = Noted
    cuda_plan.multiprocessors = lambda device: 132
    compiled = {}  # where sizes differ and macros do not, the kernel is the same
    for arch in architectures:
        for case in cases():
            compile_calls(case, arch, compiled)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]])
