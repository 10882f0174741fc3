"""Compile the kernels of real calls ahead of time, without a GPU, and print what each of them needs.

    PYTHONPATH=.:tests TRITON_INTERPRET=0 python tests/compile_ahead.py 80 90 100

calls the Triton rooms as the public functions do, with every kernel launch replaced by a note of its
arguments. Each noted launch is then compiled as Triton would compile it on NVIDIA GPUs of these
architectures (compute capability times 10). Prints one JSON object a kernel: registers and bytes
spilled a thread, bytes of SRAM a program.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from cases import at_precision
from scan_inputs import scan_inputs
from step_inputs import at_types, step_inputs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mamba_fast.ops.causal_conv1d import triton_conv
from mamba_fast.ops.causal_conv1d import triton_update as conv_steps
from mamba_fast.ops.linear_cross_entropy import triton_rows
from mamba_fast.ops.model_step import LayerWeights, Weights, triton_step
from mamba_fast.ops.next_token import Slots, triton_next
from mamba_fast.ops.rms_norm import triton_norm
from mamba_fast.ops.selective_scan import triton_scan
from mamba_fast.ops.selective_scan.arguments import normalise
from mamba_fast.ops.selective_state_update import triton_update

KERNELS = ("scan_forward_kernel", "tile_summary_kernel", "chain_kernel", "scan_backward_kernel")
DTYPES = (torch.float32, torch.bfloat16)
PACKINGS = {
    "none": {},
    "seq_idx": {"seq_idx": torch.arange(2000)[None] // 700},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 700, 2000])},
}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}
ORDER = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")


def noting(room, names):
    """A list that fills with (kernel, positional, keyword arguments) of every launch in this room."""
    noted = []
    for name in names:
        kernel = getattr(room, name)

        def run(*args, grid, warmup, kernel=kernel, **options):
            noted.append((kernel, args, options))

        kernel.run = run
    return noted


def launches(dtype, packing, split):
    """The launches of a forward and a backward of the scan with every option on."""
    noted = noting(triton_scan, KERNELS)
    triton_scan._PROGRAMS_A_MULTIPROCESSOR = 10**9 if split else 0
    rows = len(packing["cu_seqlens"]) - 1 if "cu_seqlens" in packing else 1
    inputs = at_precision(scan_inputs(0, 1, 96, 2000, 16, B="grouped", C="grouped"), dtype)
    inputs["initial_state"] = torch.randn(rows, 96, 16)
    args = normalise(*(inputs[k] for k in ORDER), packing.get("seq_idx"), packing.get("cu_seqlens"))
    y, last, states = triton_scan.forward(*args, True)
    *tensors, state, seq, softplus, varlen, rows = args
    for again in (None,) if packing else (None, torch.empty_like(y)):  # only the block asks: it packs nothing
        triton_scan.backward(y, last, *tensors, seq, softplus, varlen, rows, states, state, False, y=again)
    return noted


def update_launches(dtype):
    """One launch an update: a small and a large batch, rows of a cache, one decay a head, an N with gaps."""
    noted = noting(triton_update, ("update_kernel",))
    sizes = [(1, 0, 1536, 16), (64, 0, 1536, 16), (2, 8, 64, 128, 2), (3, 0, 100, 17), (2, 0, 64, 256)]
    for i, size in enumerate(sizes):
        for tied in (False, True):
            k = at_types(step_inputs(*size, tied=tied), dtype, dtype)
            softplus = k.pop("dt_softplus")
            indices = torch.arange(size[0], dtype=torch.int32) if i % 2 else None
            triton_update.update(*k.values(), softplus, indices)
    return noted


def norm_launches(dtype):
    """Forward and backward of both norms, with a float32 residual, at widths of published models."""
    noted = noting(triton_norm, ("norm_forward_kernel", "norm_backward_kernel", "sum_parts_kernel"))
    for width in (768, 2560, 5120):
        x, s, weight = (
            torch.ones(64, width, dtype=dtype),
            torch.ones(64, width),
            torch.ones(width, dtype=dtype),
        )
        for rms, bias in ((True, None), (False, weight)):
            y, s, mean, rstd = triton_norm.forward(x, weight, bias, s, 1e-5, s.dtype, rms, True, True)
            triton_norm.backward(y, s, s, None, weight, bias, mean, rstd, dtype, s.dtype, rms)
    return noted


def loss_launches(dtype):
    """With gradients, scaled or not, and without; the published vocabulary and one that needs no block."""
    noted = noting(triton_rows, ("cross_entropy_kernel",))
    for columns in (50280, 100):
        for keep, scale in ((True, None), (True, torch.ones(64)), (False, None)):
            logits, labels = torch.ones(64, columns, dtype=dtype), torch.zeros(64, dtype=torch.int64)
            triton_rows.rows(logits, labels, torch.ones(64), scale, columns, -100, keep)
    return noted


def token_launches(dtype):
    """Greedy tokens of the published vocabulary and of a small one, alone and with penalty and ends."""
    noted = noting(triton_next, ("greedy_token_kernel",))
    for batch, columns in ((1, 50280), (128, 50277), (3, 100)):
        place, finished = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.bool)
        token, tokens = place[:, None], torch.zeros(128, batch, dtype=torch.int64)
        seen, penalty = torch.zeros(batch, columns, dtype=torch.bool), torch.ones(())
        for ends, penalised in ((0, ()), (2, ()), (1, (seen, penalty))):
            slots = Slots(token, tokens, place, place.new_zeros(ends), finished, *penalised)
            triton_next.greedy(torch.ones(batch, columns, dtype=dtype), slots)
    return noted


def conv_launches(dtype):
    """Forward and backward of both layouts: as published and aligned; with every option, nothing aligned."""
    kernels = {k: v for k, v in (vars(triton_conv) | vars(conv_steps)).items() if k.endswith("_kernel")}
    noted = noting(SimpleNamespace(**kernels), kernels)
    for channels, seqlen, options in ((96, 2000, False), (97, 2001, True)):
        rows, columns = (
            torch.ones(2, channels, seqlen, dtype=dtype),
            torch.ones(2, seqlen, channels, dtype=dtype),
        )
        weight, bias = torch.ones(channels, 4), torch.ones(channels)
        seq_idx = torch.zeros(2, seqlen, dtype=torch.int32) if options else None
        state = torch.ones(2, channels, 3, dtype=dtype) if options else None
        for x in (rows, columns.transpose(1, 2)):
            y, _ = triton_conv.forward(x, weight, bias, seq_idx, state, True, False)
            triton_conv.backward(y, None, x, weight, bias, seq_idx, state, True)
        index = torch.ones(2, dtype=torch.int32) if options else None
        table = torch.ones(2, channels, 4, dtype=dtype)
        triton_conv.update(rows[..., : 1 + options], table, weight, bias, True, index, index, -1)
        triton_conv.update(columns.mT[..., :1], table, weight, bias, True, None, index, -1)
        triton_conv.varlen_states(columns[0], torch.ones(3, dtype=torch.int32), 4)
    return noted


def step_launches(dtype):
    """A layer of the published sizes for few and for many sequences, and one that fits no tile."""
    noted = noting(triton_step, [name for name in vars(triton_step) if name.endswith("_kernel")])
    for rows, d_model, rank in ((9, 768, 48), (128, 768, 48), (32, 2560, 160), (64, 40, 24)):
        sizes, kept = (d_model, 2 * d_model, rank, 16), torch.float32 if rank == 24 else dtype
        weights = layer_weights(*sizes, dtype)
        states = [(torch.ones(rows, sizes[1], 4, dtype=kept), torch.ones(rows, sizes[1], 16, dtype=kept))]
        triton_step.step(weights, torch.zeros(rows, dtype=torch.int64), states)
    return noted


def layer_weights(E, D, R, N, dtype):
    """Weights of one layer, of ones."""
    half, single = (partial(torch.ones, dtype=t) for t in (dtype, torch.float32))
    layer = LayerWeights(
        half(E), half(2 * D, E), half(D, 4), half(D), half(R + 2 * N, D), half(D, R), half(D), single(D, N),
        single(D), half(E, D),
    )  # fmt: skip
    return Weights((layer,), half(8, E), half(E), half(8, E), 1e-5)


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
    return f"*{TYPES[value.dtype]}" if tensor else "fp32" if isinstance(value, float) else "i32"


def as_ones(value):
    """Every integer argument 1, which Triton turns into a constant: a kernel must compile with that too."""
    if isinstance(value, tuple):
        return tuple(map(as_ones, value))
    return 1 if isinstance(value, int) else value


def source(kernel, args, options):
    """What the compiler is given for a launch, and the options that are no arguments of the kernel."""
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


def early(noted, arch):
    """The launches as they are made on this architecture: from 9.0 on a kernel may begin early."""
    if arch < 90:
        return noted
    pdl = {"PDL": True, "launch_pdl": True}
    return [(kernel, args, options | (pdl if "PDL" in options else {})) for kernel, args, options in noted]


def report(noted, arch, **label):
    """Compile each different launch once and print what it needs."""
    for kernel, given, options in different(early(noted, arch)):
        built = triton.compile(given, target=GPUTarget("cuda", arch, 32), options=options)
        print(json.dumps({"arch": arch, "kernel": kernel.__name__} | label | resources(built)))


def compile_with_ones(noted, arch):
    """Each different launch as if all of its sizes and strides were 1."""
    ones = [(kernel, tuple(map(as_ones, args)), options) for kernel, args, options in noted]
    for _, given, options in different(ones):
        triton.compile(given, target=GPUTarget("cuda", arch, 32), options=options)


def different(noted):
    """(kernel, what the compiler is given, options) of each launch, once."""
    done = set()
    for kernel, args, options in noted:
        given, options = source(kernel, args, options)
        if given.hash() not in done:
            done.add(given.hash())
            yield kernel, given, options


if __name__ == "__main__":
    architectures = [int(a) for a in sys.argv[1:]]
    for arch, dtype, packing, split in cases(architectures):
        noted = launches(dtype, PACKINGS[packing], split)
        report(noted, arch, dtype=TYPES[dtype], packing=packing, split=split)
    for arch, dtype in itertools.product(architectures, DTYPES):
        noted = update_launches(dtype) + norm_launches(dtype) + conv_launches(dtype) + loss_launches(dtype)
        noted += token_launches(dtype) + (step_launches(dtype) if dtype == torch.bfloat16 else [])
        report(noted, arch, dtype=TYPES[dtype], packing="none")
        if (arch, dtype) == (architectures[0], torch.bfloat16):
            compile_with_ones(noted + launches(dtype, PACKINGS["none"], True), arch)
