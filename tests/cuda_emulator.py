"""Run the CUDA kernels of the repository on a CPU: g++ compiles them against tests/emulated_machine.h."""

import ctypes
import hashlib
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

HEADER = Path(__file__).parent / "emulated_machine.h"
_CACHE = Path(tempfile.gettempdir()) / "mamba-fast-emulated"
_MAIN = """
static const Params* launched;
static void fiber_main() {{
  {entry}(*launched);
  finish();
}}
extern "C" void launch(const Params* p, int grid, int threads, int bytes) {{
  launched = p;
  for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) run_block(threads, bytes);
}}
"""


class EmulatedKernel:
    """Takes the place of mamba_fast.nvrtc.Kernel: the same sources and macros, blocks one after another."""

    loaded: ClassVar[dict] = {}

    def __init__(self, library, shared_bytes):
        self.library, self.shared_bytes = library, shared_bytes

    @classmethod
    def load(cls, sources, defines, entry, shared_bytes=0, device=None):
        key = (tuple(sources), tuple(sorted(defines.items())), entry, shared_bytes)
        if key not in cls.loaded:
            cls.loaded[key] = cls(ctypes.CDLL(str(build(sources, defines, entry))), shared_bytes)
        return cls.loaded[key]

    def launch(self, grid, threads, params, stream=None, cooperative=False, early=False):
        self.library.launch(ctypes.byref(params), grid, threads, self.shared_bytes)


def build(sources, defines, entry):
    """The shared library of one kernel, compiled once for its text and macros."""
    text = [HEADER.read_text(), *(p.read_text() for p in sources if not p.name.endswith("_machine.cuh"))]
    source = (
        "".join(f"#define {k} {v}\n" for k, v in defines.items())
        + "\n".join(text)
        + _MAIN.format(entry=entry)
    )
    _CACHE.mkdir(exist_ok=True)
    target = _CACHE / f"{hashlib.sha256(source.encode()).hexdigest()[:24]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
            (Path(folder) / "kernel.cpp").write_text(source)
            command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE"]  # _longjmp
            command += ["kernel.cpp", "-o", "kernel.so"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[:4000])
            (Path(folder) / "kernel.so").replace(target)
    return target
