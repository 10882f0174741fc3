"""Ask the compiler who holds what: registers, spills, SRAM and the inner loop of every rung, no GPU needed.

    python -m mamba_fast.ladder.compiled 80 90 100

compiles each kernel ahead of time for these NVIDIA architectures (compute capability times 10) and
prints one JSON object a line. Triton must not be in interpreter mode: unset TRITON_INTERPRET.
"""

import json
import re
import sys
from itertools import product

from mamba_fast import ladder
from mamba_fast.ladder import machine_code

FLAGS = {"SOFTPLUS": (True,), "OUTPUTS": (False, True)}
HALF = (
    "u_ptr",
    "B_ptr",
    "C_ptr",
    "z_ptr",
    "y_ptr",
)  # bfloat16 here, as in training; k1 takes float32 delta, y


def kernels(rung):
    """(name, kernel, constants) for every kernel of a rung and every value of its flags, at d_state 16."""
    module = getattr(ladder, rung)
    for name, kernel in vars(module).items():
        if name.endswith("_kernel"):
            names = [p.name for p in kernel.params if p.is_constexpr]
            values = [FLAGS.get(n) or (16 if n == "BLOCK_N" else getattr(module, n),) for n in names]
            for combination in product(*values):
                yield name, kernel, dict(zip(names, combination, strict=True))


def resources(rung, kernel, constants, capability):
    """Compile one kernel: registers and bytes spilled a thread, bytes of SRAM a program, its inner loop."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for p in kernel.params:
        half = p.name in HALF and not (rung == "k1" and p.name in ("delta_ptr", "y_ptr"))  # torch made these
        kind = ("*bf16" if half else "*fp32") if p.name.endswith("_ptr") else "i32"
        signature[p.name] = "constexpr" if p.is_constexpr else kind
    built = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": getattr(ladder, rung).NUM_WARPS},
    )
    text = machine_code.cuobjdump(built.asm["cubin"], "--dump-resource-usage")
    usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
    spilled = usage["LOCAL"] + usage["STACK"]
    loop = machine_code.loop(built.asm["cubin"])
    return {"registers": usage["REG"], "spilled": spilled, "sram": built.metadata.shared, "loop": loop}


if __name__ == "__main__":
    for rung in ladder.RUNGS:
        for name, kernel, constants in kernels(rung):
            for capability in map(int, sys.argv[1:]):
                row = {"rung": rung, "kernel": name, "outputs": constants.get("OUTPUTS"), "arch": capability}
                print(json.dumps(row | resources(rung, kernel, constants, capability)))
