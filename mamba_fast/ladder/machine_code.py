"""What a compiled kernel does most: the machine instructions of its innermost loop, no GPU needed."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

KINDS = {
    "exponentials": r"MUFU\.EX2",
    "float32": r"FFMA|FMUL|FADD",
    "shuffles": r"SHFL",
    "SRAM": r"LDS|STS|BAR",
}


def loop(cubin):
    """{kind: instructions of a thread} in one turn of the shortest loop that has an exponential, or None.

    Kinds are those of KINDS and "rest": addresses, selects, jumps, loads from HBM. Instructions behind a
    condition count, whether they run or not.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", cuobjdump(cubin, "-sass"))
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    code = [re.sub(r"^@!?U?P\w+\s+", "", text) for _, text in lines]
    jumps = [(i, re.match(r"BRA.*?0x([0-9a-f]+)", text)) for i, text in enumerate(code)]
    loops = [code[at[int(found[1], 16)] : i + 1] for i, found in jumps if found]
    with_exp = [body for body in loops if any(re.match(KINDS["exponentials"], text) for text in body)]
    return dict(Counter(map(_kind, min(with_exp, key=len)))) if with_exp else None


def _kind(instruction):
    return next((kind for kind, names in KINDS.items() if re.match(names, instruction)), "rest")


def cuobjdump(cubin, option):
    """What the `cuobjdump` that comes with Triton prints of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
