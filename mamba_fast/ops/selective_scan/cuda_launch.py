"""The kernels' Params as Python packs them, and launches that are prepared once."""

import ctypes
import struct

from mamba_fast import nvrtc
from mamba_fast.ops.selective_scan import cuda_plan as plan

# In the order of struct Params in cuda_tiles.cuh.
_POINTERS = (
    "u delta B C z dy B_constant C_constant A D bias enter leave table dlast seq starts y du ddelta dz last "
    "states local total dA dB dC dD dbias dfirst dtable"
).split()
_ROWS = ("u", "delta", "z", "dy", "y", "du", "ddelta", "dz")
_STRIDES = [f"{t}_{axis}" for t in _ROWS for axis in "bdl"] + (
    "A_d A_n B_b B_g B_n B_l C_b C_g C_n C_l dB_slot dC_slot".split()
)
_INTEGERS = (
    "channels seqlen span B_span C_span blocks blocks_a_span passes chunks stretch stretches padded batch "
    "words"
).split()
_HEAD = struct.Struct(f"{len(_POINTERS)}q")
_TAIL = struct.Struct(f"{len(_STRIDES)}q{len(_INTEGERS)}i{4 * (len(_INTEGERS) % 2)}x")
_PLACES = {name: place for place, name in enumerate(_POINTERS)}
_SIZE = _HEAD.size + _TAIL.size


def strides_of(**looks):
    """{u_b, u_d, u_l, ...} of (B, D, L) tensors."""
    return {
        f"{name}_{axis}": stride
        for name, v in looks.items()
        if v is not None
        for axis, stride in zip("bdl", v.strides, strict=True)
    }


class Launch:
    """One kernel with everything but the addresses; call it with {name of a pointer: tensor or None}."""

    def __init__(self, entry, cut, macros, statics, grid, threads=None, *, device):
        shared = 0
        if threads is None:  # a kernel that works on tiles
            cut, macros = plan.fit(entry, cut, macros, device)
            shared = plan.shared_bytes(entry, cut, macros)
        self.kernel = nvrtc.Kernel.load(plan.SOURCES[entry], macros, entry, shared, device=device.index)
        self.tail = _TAIL.pack(*(statics.get(name, 0) for name in (*_STRIDES, *_INTEGERS)))
        self.grid, self.threads = grid, threads or 32 * cut.warps

    def __call__(self, given):
        pointers = [0] * len(_POINTERS)
        for name, tensor in given.items():
            if tensor is not None:
                pointers[_PLACES[name]] = tensor.data_ptr()
        params = ctypes.create_string_buffer(_HEAD.pack(*pointers) + self.tail, _SIZE)
        self.kernel.launch(self.grid, self.threads, params, early=True)
