"""What the public function accepts, and the one form in which every backend receives it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """Checked arguments in the form that every backend takes.

    B and C have four axes, (B or 1, G, N, L or 1): a constant (D, N) becomes (1, D, N, 1), a group
    of one channel that does not move in time. `seq` (B, L) int32 holds the packed sequences; with
    `varlen` its values are rows of the (rows, D, N) tables of first and last states, otherwise row b
    of the tables belongs to batch element b.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    seq: Tensor | None
    softplus: bool
    varlen: bool
    rows: int


def normalise(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, cu_seqlens):
    """Check every argument and return :class:`Arguments`; ValueError or TypeError name what is wrong."""
    plain = seq_idx is None and cu_seqlens is None and not torch.compiler.is_compiling()
    named = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    signature = _signature(named) if plain else None
    if signature in _accepted:  # the checks read nothing else, and cost more than a small scan
        B, C = _accepted[signature](B), _accepted[signature](C)
        return Arguments(*named[:3], B, C, *named[5:], None, bool(delta_softplus), False, u.shape[0])
    args = _checked(*named, bool(delta_softplus), seq_idx, cu_seqlens)
    if signature is not None and B.dim() == C.dim() > 2 and args.initial_state is initial_state:
        if len(_accepted) > 1000:
            _accepted.clear()
        _accepted[signature] = _with_group_axis if B.dim() == 3 else _as_it_is
    return args


_accepted = {}  # signature of a call that passed every check: how its B and C get four axes


def _with_group_axis(v):
    return v.unsqueeze(1)


def _as_it_is(v):
    return v


def _signature(tensors):
    """Types, shapes and devices; None where something is not a plain tensor (shapes may be symbolic then)."""
    found = []
    for t in tensors:
        if t is None:
            found.append(None)
        elif type(t) in _PLAIN:
            found += (t.dtype, t.shape, t.device)
        else:
            return None
    return tuple(found)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _checked(u, delta, A, B, C, D, z, delta_bias, initial_state, softplus, seq_idx, cu_seqlens):
    _tensor("u", u)
    if u.dim() != 3:
        raise ValueError(f"u: expected shape (B, D, L), got {tuple(u.shape)}")
    if u.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        got = str(u.dtype).removeprefix("torch.")
        raise TypeError(f"u: expected float32, float16, bfloat16 or float64, got {got}")
    batch, d_inner, seqlen = u.shape
    wide = u.dtype == torch.float64
    reals = (torch.float32, torch.float64) if wide else (torch.float32,)
    _like("delta", delta, u, (batch, d_inner, seqlen), (u.dtype,))
    A_types = (*reals, torch.complex64, torch.complex128) if wide else (torch.float32, torch.complex64)
    _like("A", A, u, (d_inner, None), A_types, hint="keep A in float32: the decay needs it")
    if z is not None:
        _like("z", z, u, (batch, d_inner, seqlen), (u.dtype,))
    for name, value in (("D", D), ("delta_bias", delta_bias)):
        if value is not None:
            _like(name, value, u, (d_inner,), reals, hint=f"keep {name} in float32, as published")
    B, C = _input_matrix("B", B, A, u), _input_matrix("C", C, A, u)
    seq, varlen, rows = _packing(u, seq_idx, cu_seqlens)
    if initial_state is not None:
        floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        _like("initial_state", initial_state, u, (rows, *A.shape), (A.dtype,) if A.is_complex() else floats)
        initial_state = initial_state.to(torch.promote_types(A.dtype, u.dtype))
    return Arguments(
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq, softplus, varlen, rows
    )  # fmt: skip


def is_constant(v, u):
    """Whether B or C, (B or 1, G, N, L or 1), does not move in time and has its own value a channel."""
    return v.shape[0] == 1 and v.shape[1] == u.shape[1] and v.shape[3] == 1


def _tensor(name, value):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _like(name, value, u, shape, dtypes, hint=None):
    """Type, device, shape (None: any size) and dtype of one tensor argument."""
    _tensor(name, value)
    if value.device != u.device:
        raise ValueError(f"{name}: expected device {u.device} (that of u), got {value.device}")
    if value.dim() != len(shape) or any(w not in (None, s) for s, w in zip(value.shape, shape, strict=True)):
        wanted = ", ".join("N" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        accepted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected {accepted}, got {got}" + (f" ({hint})" if hint else ""))


def _input_matrix(name, value, A, u):
    """B or C in any published form, checked, as (B or 1, G, N, L or 1)."""
    _tensor(name, value)
    (batch, d_inner, seqlen), d_state = u.shape, A.shape[1]
    if value.dim() == 2:
        _like(name, value, u, (d_inner, d_state), (A.dtype,))
        return value[None, :, :, None]
    if value.dim() not in (3, 4):
        raise ValueError(
            f"{name}: expected (D, N) = ({d_inner}, {d_state}), (B, N, L) or (B, G, N, L), "
            f"got {tuple(value.shape)}"
        )
    length = 2 * seqlen if A.is_complex() else seqlen  # complex: interleaved re, im pairs
    groups = value.shape[1] if value.dim() == 4 else 1
    if (value.shape[0], *value.shape[-2:]) != (batch, d_state, length):
        raise ValueError(
            f"{name}: expected shape ({batch}, {d_state}, {length}) or ({batch}, G, {d_state}, {length}), "
            f"with N = {d_state} from A, got {tuple(value.shape)}"
        )
    value = value[:, None] if value.dim() == 3 else value
    _like(name, value, u, (batch, groups, d_state, length), (u.dtype,))
    if groups == 0 or d_inner % groups:
        raise ValueError(f"{name}: the number of groups must divide D = {d_inner}, got G = {groups}")
    return value


def _packing(u, seq_idx, cu_seqlens):
    """The packed sequences as (seq (B, L) int32 or None, varlen, rows of the state tables)."""
    batch, _, seqlen = u.shape
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("seq_idx and cu_seqlens: give one of them, got both")
    if seq_idx is not None:
        _like("seq_idx", seq_idx, u, (batch, seqlen), (torch.int32, torch.int64))
        change = torch.zeros_like(seq_idx, dtype=torch.int32, memory_format=torch.contiguous_format)
        change[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        return change.cumsum(1, dtype=torch.int32), False, batch  # any integers, numbered anew
    if cu_seqlens is None:
        return None, False, batch
    _tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens: expected int32 or int64 of shape (S + 1,), S >= 1, "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(f"cu_seqlens: needs a batch of 1 that holds every sequence, got a batch of {batch}")
    if cu_seqlens.device not in (u.device, torch.device("cpu")):
        raise ValueError(
            f"cu_seqlens: expected device {u.device} (that of u) or cpu, got {cu_seqlens.device}"
        )
    # The values are checked where they can be read without making the GPU wait.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        edges = cu_seqlens.tolist()
        if edges[0] != 0 or edges[-1] != seqlen or edges != sorted(edges):
            raise ValueError(f"cu_seqlens: expected to rise from 0 to L = {seqlen}, got {edges}")
    rows, ends = len(cu_seqlens) - 1, cu_seqlens[1:].to(u.device)
    tokens = torch.arange(seqlen, device=u.device, dtype=ends.dtype)
    seq = torch.searchsorted(ends, tokens, right=True).clamp_(max=rows - 1)
    return seq.to(torch.int32)[None], True, rows
