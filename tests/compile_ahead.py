"""Compile the kernels of real calls ahead of time, without a GPU, and print what each of them needs.

    PYTHONPATH=.:tests TRITON_INTERPRET=0 python tests/compile_ahead.py 80 90 100

calls the Triton backend as `selective_scan_fn` does, with every kernel launch replaced by a note of its
arguments. Each noted launch is then compiled as Triton would compile it on NVIDIA GPUs of these
architectures (compute capability times 10). Prints one JSON object a kernel: registers and bytes
spilled a thread, bytes of SRAM a program.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from cases import at_precision
from scan_inputs import scan_inputs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mamba_fast.ops.selective_scan import triton_scan
from mamba_fast.ops.selective_scan.arguments import normalise

KERNELS = ("scan_forward_kernel", "tile_summary_kernel", "chain_kernel", "scan_backward_kernel")
DTYPES = (torch.float32, torch.bfloat16)
PACKINGS = {
    "none": {},
    "seq_idx": {"seq_idx": torch.arange(2000)[None] // 700},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 700, 2000])},
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32"}
ORDER = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")


def launches(dtype, packing, split):
    """(kernel name, positional, keyword arguments) of a forward and a backward with every option on."""
    noted = []
    for name in KERNELS:

        def run(*args, grid, warmup, name=name, **options):
            noted.append((name, args, options))

        getattr(triton_scan, name).run = run
    triton_scan._PROGRAMS_A_MULTIPROCESSOR = 10**9 if split else 0
    rows = len(packing["cu_seqlens"]) - 1 if "cu_seqlens" in packing else 1
    inputs = at_precision(scan_inputs(0, 1, 96, 2000, 16, B="grouped", C="grouped"), dtype)
    inputs["initial_state"] = torch.randn(rows, 96, 16)
    args = normalise(*(inputs[k] for k in ORDER), packing.get("seq_idx"), packing.get("cu_seqlens"))
    y, last, states = triton_scan.forward(*args, True)
    *tensors, state, seq, softplus, varlen, rows = args
    triton_scan.backward(y, last, *tensors, seq, softplus, varlen, rows, states, state)
    return noted


def specialised(value, path, constants, attributes):
    """The type of one argument; 1 and None become constants, and multiples of 16 are marked as such."""
    if isinstance(value, tuple):
        return tuple(specialised(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    tensor = isinstance(value, torch.Tensor)
    if value is None or (not tensor and value == 1):
        constants[path] = value
        return "constexpr"
    if (value.data_ptr() if tensor else value) % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return f"*{TYPES[value.dtype]}" if tensor else "i32"


def source(name, args, options):
    """What the compiler is given for a launch, and the options that are no arguments of the kernel."""
    kernel = getattr(triton_scan, name)
    options = dict(options)
    values = list(args) + [options.pop(p.name) for p in kernel.params[len(args) :]]
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = specialised(value, (i,), constants, attributes)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def resources(built):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
    spilled = usage["LOCAL"] + usage["STACK"]
    return {"registers": usage["REG"], "spilled": spilled, "sram": built.metadata.shared}


def cases(architectures):
    """What to compile: on one architecture also rows that are not split, and seq_idx."""
    for arch in architectures:
        for dtype in DTYPES:
            yield from ((arch, dtype, packing, True) for packing in ("none", "cu_seqlens"))
            if arch == architectures[1]:
                yield arch, dtype, "seq_idx", True
                yield from ((arch, dtype, packing, False) for packing in ("none", "seq_idx", "cu_seqlens"))


if __name__ == "__main__":
    for arch, dtype, packing, split in cases([int(a) for a in sys.argv[1:]]):
        done = set()
        for launch in launches(dtype, PACKINGS[packing], split):
            given, options = source(*launch)
            if given.hash() not in done:
                done.add(given.hash())
                built = triton.compile(given, target=GPUTarget("cuda", arch, 32), options=options)
                label = {"arch": arch, "kernel": launch[0], "dtype": TYPES[dtype], "packing": packing}
                print(json.dumps(label | {"split": split} | resources(built)))
