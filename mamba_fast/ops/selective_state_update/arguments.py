"""What the public function accepts."""

import torch
from torch import Tensor

FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))


def check(state, x, dt, A, B, C, D, z, dt_bias, indices):
    """ValueError or TypeError name the argument that is wrong, what came and what is accepted."""
    _float("state", state, state)
    if state.dim() not in (3, 4):
        raise ValueError(f"state: expected shape (B, P, N) or (B, H, P, N), got {tuple(state.shape)}")
    slots, *heads, channels, d_state = state.shape
    _float("x", x, state)
    if x.dim() != state.dim() - 1 or list(x.shape[1:]) != [*heads, channels]:
        wanted = ", ".join(map(str, ("B", *heads, channels)))
        raise ValueError(
            f"x: expected shape ({wanted}) beside a state {tuple(state.shape)}, got {tuple(x.shape)}"
        )
    batch = x.shape[0]
    _like("dt", dt, state, x.shape)
    _like("A", A, state, (*heads, channels, d_state))
    _matrix("B", B, state, batch, heads)
    _matrix("C", C, state, batch, heads)
    for name, value, shape in (("D", D, A.shape[:-1]), ("z", z, x.shape), ("dt_bias", dt_bias, A.shape[:-1])):
        if value is not None:
            _like(name, value, state, shape)
    if indices is None:
        if slots != batch:
            raise ValueError(
                f"state: expected {batch} rows, as many as x has (or state_batch_indices), got {slots}"
            )
        return
    _tensor("state_batch_indices", indices, state)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"state_batch_indices: expected int32 or int64, got {_name(indices.dtype)}")
    if tuple(indices.shape) != (batch,):
        raise ValueError(f"state_batch_indices: expected shape ({batch}), got {tuple(indices.shape)}")


def check_values(indices, slots):
    """Every index must be a row of the state or negative; asked where reading it makes no GPU wait."""
    if indices is not None and indices.device.type == "cpu" and indices.numel():
        largest = int(indices.max())
        if largest >= slots:
            raise ValueError(f"state_batch_indices: expected values below {slots}, got {largest}")


def _tensor(name, value, state):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.device != state.device:
        raise ValueError(f"{name}: expected device {state.device} (that of state), got {value.device}")


def _float(name, value, state):
    _tensor(name, value, state)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {_name(value.dtype)}")


def _like(name, value, state, shape):
    _float(name, value, state)
    if value.shape != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")


def _matrix(name, value, state, batch, heads):
    """B or C: (B, N), or (B, G, N) with a number of groups that divides the heads."""
    _float(name, value, state)
    d_state, most = state.shape[-1], heads[0] if heads else 1
    if value.dim() not in (2, 3) or value.shape[0] != batch or value.shape[-1] != d_state:
        raise ValueError(
            f"{name}: expected shape ({batch}, {d_state}) or ({batch}, G, {d_state}), "
            f"got {tuple(value.shape)}"
        )
    groups = value.shape[1] if value.dim() == 3 else 1
    if groups == 0 or most % groups:
        raise ValueError(f"{name}: the number of groups must divide H = {most}, got G = {groups}")


def _name(dtype):
    return str(dtype).removeprefix("torch.")
