"""The selective scan in CUDA C++, compiled by NVRTC at first use: NVIDIA GPUs of compute capability 8.0 and later.

A warp holds a few channels and, of each, a tile of tokens; see README.md in this folder. Where there are
too few channels to fill the chip the sequence is cut into stretches that are scanned at the same time:
`scan_summary` finds what a stretch hands to its neighbour and `scan_chain` chains these.
"""

import ctypes
import struct

import torch

from mamba_fast import nvrtc
from mamba_fast.ops.selective_scan import cuda_plan as plan
from mamba_fast.ops.selective_scan.arguments import is_constant

__all__ = ["CHUNK", "backward", "forward"]

CHUNK = plan.CHUNK
_POINTERS = (
    "u delta B C z dy B_constant C_constant A D bias enter leave table dlast seq y du ddelta dz last states local "
    "total dA dB dC dD dbias dfirst dtable"
).split()
_ROWS = ("u", "delta", "z", "dy", "y", "du", "ddelta", "dz")
_STRIDES = [f"{t}_{axis}" for t in _ROWS for axis in "bdl"] + (
    "A_d A_n B_b B_g B_n B_l C_b C_g C_n C_l dB_slot dC_slot".split()
)
_INTEGERS = (
    "channels seqlen span B_span C_span blocks blocks_a_span passes chunks stretch stretches padded batch ordered"
).split()
_NAMES = (*_POINTERS, *_STRIDES, *_INTEGERS)
_PARAMS = struct.Struct(f"{len(_POINTERS) + len(_STRIDES)}q{len(_INTEGERS)}i")


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq, softplus, varlen, rows, keep):
    """y (B, D, L), last_state (rows, D, N), states (B, L / CHUNK, D, N) before each chunk of tokens."""
    (batch, channels, seqlen), N = u.shape, A.shape[1]
    D, delta_bias, table = (None if v is None else v.contiguous() for v in (D, delta_bias, initial_state))
    cut = plan.cut_forward(batch, channels, seqlen, plan.spans(u, B, C)[2], u.device)
    y = torch.empty_like(u)
    if not varlen:
        last = torch.empty((rows, channels, N), dtype=torch.float32, device=u.device)
    else:  # an empty sequence keeps its state
        last = A.new_zeros(rows, channels, N) if table is None else table.clone()
    chunks = -(-seqlen // CHUNK) if keep else 0
    states = torch.empty((batch, chunks, channels, N), dtype=torch.float32, device=u.device)
    fields = _fields(cut, u, delta, A, B, C, D, z, delta_bias, table, seq) | {"chunks": chunks}
    macros = plan.defines(cut, u, A, B, C, z, seq, softplus, varlen, keep, wide=_wide(u, delta, z, y, B=B, C=C))
    enter = None if varlen else table
    if cut.stretches > 1:
        enter = _enter_stretches(cut, fields, macros, u, False, table)
    fields |= _row_strides(y=y) | {"y": y, "last": last, "states": states, "enter": enter}
    _launch("scan_forward", cut, macros, fields, cut.blocks, u.device)
    return y, last, states


def backward(
    dy, dlast, u, delta, A, B, C, D, z, delta_bias, seq, softplus, varlen, rows, states, initial_state, ordered
):
    """Every gradient, in the order u, delta, A, B, C, D, z, delta_bias, initial_state; None if absent."""
    (batch, channels, seqlen), N = u.shape, A.shape[1]
    D, delta_bias, table = (None if v is None else v.contiguous() for v in (D, delta_bias, initial_state))
    dlast = dlast.contiguous()
    cut = plan.cut_backward(batch, channels, seqlen, plan.spans(u, B, C)[2], u.device)
    # Ordered additions start from zeros where blocks of several groups share a slot: none of them fills it.
    ordered = (1 if cut.span == channels else 2) if ordered else 0
    passes = _passes(cut, batch, u.device) if ordered else 1
    blocks = -(-cut.blocks // passes)
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(delta), None if z is None else torch.empty_like(z)
    slots = (batch * cut.stretches, blocks) if ordered else (1, 1)
    sums = _Sums(u, A, B, C, D, delta_bias, *slots, ordered)
    dtable = dlast.clone() if varlen else torch.empty_like(dlast)  # that of an empty sequence
    fields = _fields(cut, u, delta, A, B, C, D, z, delta_bias, table, seq)
    fields |= _row_strides(dy=dy, du=du, ddelta=ddelta, dz=dz) | {"dy": dy, "dlast": dlast}
    wide = _wide(u, delta, z, dy, du, ddelta, dz, B=B, C=C)
    macros = plan.defines(cut, u, A, B, C, z, seq, softplus, varlen, wide=wide)
    leave = None if varlen else dlast
    if cut.stretches > 1:
        leave = _enter_stretches(cut, fields, macros, u, True, None)
    fields |= sums.fields | {
        "du": du, "ddelta": ddelta, "dz": dz, "states": states, "leave": leave, "dfirst": dtable, "dtable": dtable,
        "chunks": states.shape[1], "passes": passes, "blocks": blocks, "ordered": ordered,
    }  # fmt: skip
    _launch("scan_backward", cut, macros, fields, blocks, u.device)
    dA, dB, dC, dD, dbias = sums.finish()
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None if initial_state is None else dtable


class _Sums:
    """Gradients summed over blocks: added atomically to zeros, or, in order, in slots that are added up later."""

    def __init__(self, u, A, B, C, D, bias, slots, matrix_slots, ordered):
        (batch, channels, seqlen), N = u.shape, A.shape[1]
        self.inputs, self.u, self.padded = (B, C), u, -(-seqlen // 4) * 4
        shapes = {"dA": (slots, channels, N)}
        for name, v in (("dB", B), ("dC", C)):
            constant = is_constant(v, u)
            shapes[name] = (slots, channels, N) if constant else (matrix_slots, *v.shape[:3], self.padded)
        if D is not None:
            shapes["dD"] = (slots, channels)
        if bias is not None:
            shapes["dbias"] = (slots, channels)
        sizes = [-(-torch.Size(s).numel() // 4) * 4 for s in shapes.values()]  # each begins at 16 bytes
        make = torch.empty if ordered == 1 else torch.zeros
        memory = make(sum(sizes), dtype=torch.float32, device=u.device)
        parts = memory.split(sizes)
        self.sums = {k: p[: torch.Size(s).numel()].view(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}
        self.fields = self.sums | {"dB_slot": self.sums["dB"].stride(0), "dC_slot": self.sums["dC"].stride(0)}
        self.fields["padded"] = self.padded

    def finish(self):
        """dA, dB, dC, dD, ddelta_bias in the types and shapes of the inputs."""
        total = {k: v[0] if v.shape[0] == 1 else v.sum(0) for k, v in self.sums.items()}
        for name, v in zip(("dB", "dC"), self.inputs, strict=True):
            grad = total[name]
            total[name] = grad[None, :, :, None] if is_constant(v, self.u) else grad[..., : v.shape[3]].to(v.dtype)
        return tuple(total.get(k) for k in ("dA", "dB", "dC", "dD", "dbias"))


def _passes(cut, batch, device):
    """Groups of channels a block takes one after another in ordered mode: each block has a slot for dB and dC."""
    blocks = batch * cut.blocks * cut.stretches
    return max(1, min(4, blocks // (2 * plan.multiprocessors(device))))


def _enter_stretches(cut, fields, macros, u, reverse, table):
    """(B, S, D, N): the state that enters each stretch from its left or, with reverse, the flow from its right."""
    batch, channels, N = u.shape[0], u.shape[1], macros["N"]
    local = torch.empty((batch, cut.stretches, channels, N), dtype=torch.float32, device=u.device)
    total, enter = local.new_empty(local.shape[:3]), torch.empty_like(local)
    macros = macros | {"REVERSE": int(reverse), "UNROLL": 1}
    fields = fields | {"local": local, "total": total, "table": table}
    _launch("scan_summary", cut, macros, fields, cut.blocks, u.device)
    fields["dtable" if reverse else "states"] = enter
    chained = {"CHAIN": 1, "VARLEN": macros["VARLEN"]}
    grid = -(-batch * channels * N // 128)
    _launch("scan_chain", cut, macros | chained, fields, None, u.device, grid, 128)
    return enter


def _fields(cut, u, delta, A, B, C, D, z, bias, table, seq):
    """The members of the kernels' Params that the inputs give."""
    batch, channels, seqlen = u.shape
    B_span, C_span, span = plan.spans(u, B, C)
    fields = {
        "u": u, "delta": delta, "A": A, "D": D, "z": z, "bias": bias, "table": table, "seq": seq,
        "A_d": A.stride(0), "A_n": A.stride(1), "channels": channels, "seqlen": seqlen, "span": span,
        "B_span": B_span, "C_span": C_span, "blocks": cut.blocks, "blocks_a_span": -(-span // cut.block_d),
        "passes": 1, "stretch": cut.stretch, "stretches": cut.stretches, "batch": batch,
    }  # fmt: skip
    for name, v in (("B", B), ("C", C)):
        fields[f"{name}_constant" if is_constant(v, u) else name] = v
        fields |= zip((f"{name}_{axis}" for axis in "bgnl"), v.stride(), strict=True)
    return fields | _row_strides(u=u, delta=delta, z=z)


def _row_strides(**tensors):
    return {
        f"{name}_{axis}": stride
        for name, t in tensors.items()
        if t is not None
        for axis, stride in zip("bdl", t.stride(), strict=True)
    }


def _wide(*rows, B, C):
    return plan.is_wide(*rows), plan.is_wide(B), plan.is_wide(C)


def _launch(entry, cut, macros, fields, blocks, device, grid=None, threads=32 * plan.WARPS):
    shared = 0 if grid else plan.shared_bytes(entry, cut, macros)
    kernel = nvrtc.Kernel.load(plan.SOURCES[entry], macros, entry, shared, device=device.index)
    values = [fields.get(name, 0) for name in _NAMES]
    values = [v.data_ptr() if isinstance(v, torch.Tensor) else v or 0 for v in values]
    packed = ctypes.create_string_buffer(_PARAMS.pack(*values), _PARAMS.size)
    kernel.launch(grid or fields["batch"] * cut.stretches * blocks, threads, packed)
