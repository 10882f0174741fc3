"""The selective scan in CUDA C++, compiled by NVRTC at first use, for compute capability 8.0 and later.

A warp holds a few channels and, of each, a tile of tokens; see README.md in this folder. Where there are
too few channels to fill the chip the sequence is cut into stretches that are scanned at the same time:
`scan_summary` finds what a stretch hands to its neighbour and `scan_chain` chains these.
"""

import functools

import torch

from mamba_fast.ops.selective_scan import cuda_plan as plan
from mamba_fast.ops.selective_scan.arguments import is_constant
from mamba_fast.ops.selective_scan.cuda_launch import Launch, strides_of

__all__ = ["CHUNK", "backward", "forward"]

CHUNK = plan.CHUNK


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq, softplus, varlen, rows, keep):
    """y (B, D, L), last_state (rows, D, N), states (B, L / CHUNK, D, N) before each chunk of tokens."""
    (batch, channels, seqlen), N, device = u.shape, A.shape[1], u.device
    D, delta_bias, table = _contiguous(D, delta_bias, initial_state)
    y, last = torch.empty_like(u), _empty(device, rows, channels, N)
    if varlen:  # an empty sequence keeps its state
        last = last.zero_() if table is None else table.clone()
    states = _empty(device, batch, -(-seqlen // CHUNK) if keep else 0, channels, N)
    looks = tuple(map(plan.look, (u, delta, z, y, A, B, C)))
    calls = _forward_calls(looks, u.dtype, seq is not None, softplus, varlen, keep, device)
    given = {
        "u": u, "delta": delta, "A": A, calls.B: B, calls.C: C, "D": D, "z": z, "bias": delta_bias,
        "table": table, "seq": seq, "y": y, "last": last, "states": states,
        "enter": None if varlen else table,
    }  # fmt: skip
    given["starts"] = _find_starts(calls, seq)
    if calls.summary:
        given["enter"] = _enter_stretches(calls, given, device, "states")
    calls.main(given)
    return y, last, states


def backward(
    dy, dlast, u, delta, A, B, C, D, z, delta_bias, seq, softplus, varlen, rows, states, initial_state,
    ordered, dz=None, y=None,
):  # fmt: skip
    """Every gradient, in the order u, delta, A, B, C, D, z, delta_bias, initial_state; None if absent.

    dlast may be None: nothing was made of the last state. That of z is written into `dz` if it is given, and
    beside z the forward's y into `y` (B, D, L) of u's type, any strides.
    """
    D, delta_bias, table, dlast = _contiguous(D, delta_bias, initial_state, dlast)
    if varlen and dlast is None:
        dlast = A.new_zeros(rows, *A.shape)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = torch.empty_like(z) if dz is None and z is not None else dz
    looks = tuple(map(plan.look, (u, delta, z, dy, du, ddelta, dz, y, A, B, C)))
    calls = _backward_calls(looks, u.dtype, seq is not None, softplus, varlen, ordered, u.device)
    sums = calls.sums(u.device, D is not None, delta_bias is not None)
    dtable = None
    if initial_state is not None:  # that of an empty sequence is its last state's
        dtable = dlast.clone() if varlen else torch.empty_like(table)
    given = {
        "u": u, "delta": delta, "A": A, calls.B: B, calls.C: C, "D": D, "z": z, "bias": delta_bias,
        "table": table, "seq": seq, "dy": dy, "dlast": dlast, "leave": None if varlen else dlast,
    }  # fmt: skip
    given["starts"] = _find_starts(calls, seq)
    if calls.summary:
        given["leave"] = _enter_stretches(calls, given | {"table": None}, u.device, "dtable")
    given |= sums
    given |= {"du": du, "ddelta": ddelta, "dz": dz, "y": y}
    given |= {"states": states, "dfirst": dtable, "dtable": dtable}
    calls.main(given)
    dA, dB, dC, dD, dbias = calls.add_up(sums, B, C)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dtable


def _contiguous(*tensors):
    return (None if t is None else t.contiguous() for t in tensors)


def _empty(device, *shape):
    return torch.empty(shape, dtype=torch.float32, device=device)


def _find_starts(calls, seq):
    """(B, words) bits of the tokens with which a packed sequence starts; None where rows are not packed."""
    if not calls.starts:
        return None
    starts = torch.empty(calls.words, dtype=torch.int32, device=seq.device)
    calls.starts({"seq": seq, "starts": starts})
    return starts


def _enter_stretches(calls, given, device, result):
    """(B, S, D, N): the state that enters each stretch from its left; backward, the flow from its right."""
    local = _empty(device, *calls.stretches)
    total, enter = _empty(device, *calls.stretches[:3]), torch.empty_like(local)
    given = given | {"local": local, "total": total}
    calls.summary(given)
    calls.chain(given | {result: enter})
    return enter


class _Calls:
    """The launches of one kind of call, prepared once: kernels compiled, strides and sizes packed."""

    def __init__(self, cut, u, B, C, statics, macros, reverse, entry, blocks, device):
        batch, channels, _ = u.shape
        self.B, self.C = (
            ("B_constant" if is_constant(B, u) else "B"),
            ("C_constant" if is_constant(C, u) else "C"),
        )
        self.stretches = (batch, cut.stretches, channels, macros["N"])
        prepare = functools.partial(Launch, device=device)
        self.main = prepare(entry, cut, macros, statics, batch * cut.stretches * blocks)
        self.summary = self.chain = self.starts = None
        if macros["PACKED"]:
            words_grid = -(-batch * statics["words"] * 32 // 128)
            self.starts = prepare(
                "scan_starts", cut, plan.for_starts(macros), statics, words_grid, threads=128
            )
            self.words = batch, statics["words"]
        if cut.stretches > 1:
            cut = cut.abreast(channels)
            macros = macros | {"REVERSE": int(reverse), "ALONG": 1, "UNROLL": 1, "KEEP": 0, "ORDERED": 0}
            statics = statics | {"passes": 1} | _blocks(cut)
            self.summary = prepare("scan_summary", cut, macros, statics, batch * cut.stretches * cut.blocks)
            chain_grid = -(-batch * channels * macros["N"] // 128)
            self.chain = prepare("scan_chain", cut, macros | {"CHAIN": 1}, statics, chain_grid, threads=128)


def _named(looks):
    return tuple(None if v is None else plan.Look(*v) for v in looks)


@functools.lru_cache(maxsize=1024)
def _forward_calls(looks, io, packed, softplus, varlen, keep, device):
    looks = _named(looks)
    u, delta, z, y, A, B, C = looks
    batch, channels, seqlen = u.shape
    cut = plan.cut_forward((batch, channels, seqlen, plan.spans(u, B, C)[2], device), roomy=varlen)
    if packed:  # where sequences start takes registers, and so do their first and last states
        cut = plan.with_registers(cut, 3, device)
    cut = cut._replace(unroll=plan.unrolled(cut, io, A.shape[1], packed, varlen, device))
    wide = plan.is_wide(io, u, delta, z, y), plan.is_wide(io, B), plan.is_wide(io, C)
    macros = plan.defines(
        cut, io, A.shape[1], B, C, u, z is not None, packed, softplus, varlen, keep, wide=wide,
        big=plan.is_big(*looks),
    )  # fmt: skip
    statics = (
        _statics(cut, u, A, B, C) | strides_of(u=u, delta=delta, z=z, y=y) | {"chunks": -(-seqlen // CHUNK)}
    )
    return _Calls(cut, u, B, C, statics, macros, False, "scan_forward", cut.blocks, device)


@functools.lru_cache(maxsize=1024)
def _backward_calls(looks, io, packed, softplus, varlen, ordered, device):
    looks = _named(looks)
    u, delta, z, dy, du, ddelta, dz, y, A, B, C = looks
    batch, channels, seqlen = u.shape
    size = batch, channels, seqlen, plan.spans(u, B, C)[2], device
    # Tables of states, sums in two parts, and where sequences start (between warps, or beside ordered sums)
    # take registers.
    wide_sums = io == torch.float32
    needs = plan.needs_of(io, A.shape[1], B, C, u, z is not None, ordered)
    choose, roomy = (plan.cut_ordered, packed or wide_sums) if ordered else (plan.cut_backward, packed)
    cut = choose(size, needs, roomy)
    if packed:
        cut = plan.with_registers(cut, 12 // cut.warps if varlen or ordered or cut.along > 1 else 4, device)
    if wide_sums:
        cut = cut._replace(min_blocks=min(cut.min_blocks, 12 // cut.warps))
    # Ordered additions start from zeros where blocks of several groups share a slot: none of them fills it.
    ordered = (1 if cut.span == channels else 2) if ordered else 0
    passes = plan.passes(A.shape[1]) if ordered else 1
    blocks = -(-cut.blocks // passes)
    wide = plan.is_wide(io, *looks[:8]), plan.is_wide(io, B), plan.is_wide(io, C)
    macros = plan.defines(
        cut, io, A.shape[1], B, C, u, z is not None, packed, softplus, varlen, ordered=ordered, buffers=1,
        wide=wide, big=plan.is_big(*looks),
    )  # fmt: skip
    statics = _statics(cut, u, A, B, C)
    statics |= strides_of(u=u, delta=delta, z=z, dy=dy, du=du, ddelta=ddelta, dz=dz, y=y)
    slots = (batch * cut.stretches, blocks) if ordered else (1, 1)
    sums = _Sums(u, A, B, C, *slots, ordered)
    statics |= sums.statics | {"chunks": -(-seqlen // CHUNK), "passes": passes, "blocks": blocks}
    calls = _Calls(cut, u, B, C, statics, macros, True, "scan_backward", blocks, device)
    calls.sums, calls.add_up = sums.memory, sums.add_up
    return calls


def _statics(cut, u, A, B, C):
    """The numbers of the kernels' Params that do not change from call to call."""
    batch, channels, seqlen = u.shape
    B_span, C_span, span = plan.spans(u, B, C)
    statics = {
        "A_d": A.strides[0], "A_n": A.strides[1], "channels": channels, "seqlen": seqlen, "span": span,
        "B_span": B_span, "C_span": C_span, "passes": 1, "stretch": cut.stretch, "stretches": cut.stretches,
        "batch": batch, "words": -(-seqlen // 32) + 1,
    }  # fmt: skip
    statics |= _blocks(cut)
    for name, v in (("B", B), ("C", C)):
        statics |= zip((f"{name}_{axis}" for axis in "bgnl"), v.strides, strict=True)
    return statics


def _blocks(cut):
    return {"blocks": cut.blocks, "blocks_a_span": -(-cut.span // cut.block_d)}


def _narrow(grad, dtype):
    """dB or dC in the type of B and C. In bfloat16 the kernel's sums lack what KEPT says."""
    if grad.dtype == dtype:
        return grad
    return torch.mul(
        grad, plan.KEPT if dtype == torch.bfloat16 else 1.0, out=torch.empty_like(grad, dtype=dtype)
    )


class _Sums:
    """Gradients summed over blocks: atomically onto zeros, or in order in slots that are added up later."""

    def __init__(self, u, A, B, C, slots, matrix_slots, ordered):
        (_, channels, seqlen), N = u.shape, A.shape[1]
        self.make = torch.empty if ordered == 1 else torch.zeros
        self.constant = tuple(is_constant(v, u) for v in (B, C))
        padded = -(-seqlen // CHUNK) * CHUNK  # whole tiles
        self.shapes = {"dA": (slots, channels, N), "dD": (slots, channels), "dbias": (slots, channels)}
        for name, v, constant in zip(("dB", "dC"), (B, C), self.constant, strict=True):
            self.shapes[name] = (slots, channels, N) if constant else (matrix_slots, *v.shape[:3], padded)
        self.statics = {"padded": padded} | {
            f"{k}_slot": torch.Size(self.shapes[k][1:]).numel() for k in ("dB", "dC")
        }
        self.laid_out = functools.cache(self._lay_out)

    def _lay_out(self, has_D, has_bias):
        """Numbers in all, and {name: shape, strides, offset} of each sum; each begins at 16 bytes."""
        places, end = {}, 0
        for name, shape in self.shapes.items():
            if (name == "dD" and not has_D) or (name == "dbias" and not has_bias):
                continue
            strides = torch.empty(shape, device="meta").stride()
            skip = 1 if shape[0] == 1 else 0  # a single slot needs no axis
            places[name] = (shape[skip:], strides[skip:], end)
            end += -(-torch.Size(shape).numel() // 4) * 4
        return end, places

    def memory(self, device, has_D, has_bias):
        size, places = self.laid_out(has_D, has_bias)
        memory = self.make(size, dtype=torch.float32, device=device)
        return {name: memory.as_strided(*place) for name, place in places.items()}

    def add_up(self, sums, B, C):
        """dA, dB, dC, dD, ddelta_bias in the types and shapes of the inputs."""
        total = {k: v.sum(0) if self.shapes[k][0] > 1 else v for k, v in sums.items()}
        if B.dtype != torch.float32 and not any(self.constant):
            total |= self._narrowed(total["dB"], total["dC"], B.dtype)
        for name, v, constant in zip(("dB", "dC"), (B, C), self.constant, strict=True):
            grad = total[name]
            if constant:
                total[name] = grad[None, :, :, None]
            else:
                grad = grad if grad.shape[-1] == v.shape[3] else grad[..., : v.shape[3]]
                total[name] = _narrow(grad, v.dtype)
        return tuple(total.get(k) for k in ("dA", "dB", "dC", "dD", "dbias"))

    def _narrowed(self, dB, dC, dtype):
        """Both in one kernel: they lie one behind the other."""
        if dB.untyped_storage().data_ptr() != dC.untyped_storage().data_ptr():
            return {}
        both = _narrow(dB.as_strided((dB.numel() + dC.numel(),), (1,), dB.storage_offset()), dtype)
        return {"dB": both[: dB.numel()].view(dB.shape), "dC": both[dB.numel() :].view(dC.shape)}
