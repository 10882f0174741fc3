"""Launching the one kernel of a step: who is where in memory, and how much SRAM a block needs."""

import ctypes
import struct
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch

from mamba_fast import nvrtc
from mamba_fast.ops.rooms import shared_limit

_FOLDER = Path(__file__).parent
SOURCES = [
    _FOLDER.parent / "selective_scan" / "cuda_machine.cuh",
    _FOLDER / "step_machine.cuh",
    _FOLDER / "step_product.cuh",
    _FOLDER / "step_layer.cuh",
    _FOLDER / "step_choice.cuh",
    _FOLDER / "model_step.cu",
]
WORKERS = 480  # threads that compute; 32 more bring the weights
GROUP = 96  # as in step_product.cuh
FLIGHT = 3  # pieces of weights that a block has on their way at a time
MOST_PIECE = 12288  # numbers of a piece, at most
_IO = {torch.float16: 1, torch.bfloat16: 2}
_PARAMS = struct.Struct("18q3if")  # struct Params in model_step.cu
_MOST_PLANS = 16
_plans = OrderedDict()  # (addresses, sizes): the plan
_captured = {}  # those that a CUDA graph reads: kept for the life of the process, as it has their addresses


class Plan(NamedTuple):
    """What stays the same from step to step, for these weights and states at these places."""

    kernel: object
    layers: torch.Tensor  # their addresses
    scratch: list  # what blocks hand to each other
    blocks: int


def step(weights, tokens, states, slots=None, columns=None):
    """logits (B, V) of tokens (B,) int64; states [(conv_state, ssm_state)] are changed in place.

    slots, columns : as model_step takes them. None where the weights of eight rows do not fit into the shared
    memory of a block; and while a CUDA graph is being captured of a step that has not run before, whose table
    of addresses has to be on the device already.
    """
    plan = _plan(weights, tokens, states)
    if plan is None:
        return None
    logits = weights.head.new_empty(len(tokens), len(weights.head))
    *scratch, best = plan.scratch
    given = (plan.layers, weights.embedding, weights.norm_f, weights.head, tokens, logits, *scratch)
    places, counts = 6 * [0], (0, 0)
    if slots is not None:
        chosen = (slots.eos, slots.token, slots.tokens, slots.place, slots.finished, best)
        places = [v.data_ptr() for v in chosen]
        counts = (len(weights.head) if columns is None else columns, len(slots.eos))
    packed = _PARAMS.pack(*(v.data_ptr() for v in given), *places, *counts, len(weights.head), weights.eps)
    params = ctypes.create_string_buffer(packed, _PARAMS.size)
    plan.kernel.launch(plan.blocks, WORKERS + 32, params, cooperative=True)
    return logits


def _plan(weights, tokens, states):
    rows = [
        [0 if v is None else v.data_ptr() for v in (*layer, *kept)]
        for layer, kept in zip(weights.layers, states, strict=True)
    ]
    device, dtype, wide = tokens.device, weights.head.dtype, states[0][0].dtype == torch.float32
    sizes = (*weights.head.shape, *weights.layers[0].conv.shape, weights.dt_rank, weights.d_state)
    key = (len(tokens), dtype, wide, sizes, device, *(p for row in rows for p in row))
    plan = _captured.get(key, _plans.get(key))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if plan is not None:
            _captured[key] = plan
        return plan
    if plan is None and key not in _plans:
        while len(_plans) >= _MOST_PLANS:
            _plans.popitem(last=False)
        plan = _plans[key] = _new_plan(weights, len(tokens), states, rows, device)
    return plan


def _new_plan(weights, batch, states, rows, device):
    wide = states[0][0].dtype == torch.float32
    macros = macros_for(weights, batch, states[0][0].shape[2], wide, _multiprocessors(device))
    macros["RING"] = ring_for(macros, shared_limit(device))
    if not fits(macros):
        return None
    ranks = batch * (weights.dt_rank + 2 * weights.d_state)
    single = {"dtype": torch.float32, "device": device}
    scratch = [
        torch.empty(batch, macros["D_MODEL"], **single),  # residual
        torch.empty(macros["BLOCKS"], ranks, **single),  # partial
        torch.empty(ranks, **single),  # ranks
        weights.head.new_empty(batch, macros["D_INNER"]),  # y
        *torch.zeros(2, 8, dtype=torch.int32, device=device),  # arrivals, start
        torch.empty(macros["BLOCKS"], batch, dtype=torch.int64, device=device),  # best
    ]
    kernel = nvrtc.Kernel.load(SOURCES, macros, "model_step", shared_bytes(macros), device=device.index)
    return Plan(kernel, torch.tensor(rows, device=device), scratch, macros["BLOCKS"])


def macros_for(weights, batch, width, wide_states, blocks):
    """What the kernel is compiled for, without RING."""
    d_inner = len(weights.layers[0].D)
    return {
        "IO": _IO[weights.head.dtype],
        "WIDE_STATES": int(wide_states),
        "BATCH": batch,
        "WORKERS": WORKERS,
        "BLOCKS": blocks,
        "LAYERS": len(weights.layers),
        "D_MODEL": weights.head.shape[1],
        "D_INNER": d_inner,
        "DT_RANK": weights.dt_rank,
        "D_STATE": weights.d_state,
        "WIDTH": width,
        "PIECE": max(k * _rows_a_piece(k) for k in (weights.head.shape[1], d_inner)),
        "FLIGHT": FLIGHT,
    }


def _rows_a_piece(columns):
    """Rows that come as one piece of the ring, as in step_product.cuh."""
    return max(rows for rows in (1, 2, 4, 8) if rows == 1 or rows * columns <= MOST_PIECE)


def ring_for(macros, limit):
    """How many pieces of weights fit into the shared memory of a block beside everything else."""
    none, one = (shared_bytes(macros | {"RING": count}) for count in (0, 1))
    return (limit - none) // (one - none)


def fits(macros):
    """Whether the ring holds eight rows of out_proj, and all pieces that are on their way."""
    return macros["RING"] >= max(FLIGHT, 8 // _rows_a_piece(macros["D_INNER"]))


def shared_bytes(macros):
    """The size of struct Room in model_step.cu, and a few bytes more for its alignment."""
    batch, blocks = macros["BATCH"], macros["BLOCKS"]
    own = -(-macros["D_INNER"] // 4 // blocks) * 4
    ranks = batch * (macros["DT_RANK"] + 2 * macros["D_STATE"])
    readers = max(1, WORKERS // (ranks // 4))
    floats = WORKERS // 32 * (GROUP * batch + 8) + own * batch + ranks + readers * ranks
    piece = 2 * macros["PIECE"] + 2 * 8
    return macros["RING"] * piece + macros["LAYERS"] * 12 * 8 + 4 * floats + 2 * 8 * -(-own // 16) * 16 + 80


def _multiprocessors(device):
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
