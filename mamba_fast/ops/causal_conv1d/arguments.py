"""What the public functions accept: every check."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def is_silu(activation):
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def check_input(x, shapes):
    """x is a tensor of a float type with one of these shapes: strings such as "(B, D, L)"."""
    _tensor("x", x)
    if x.dim() not in [shape.count(",") + 1 for shape in shapes]:
        raise ValueError(f"x: expected shape {' or '.join(shapes)}, got {tuple(x.shape)}")
    if x.dtype not in FLOATS and x.dtype != torch.float64:
        got = _short(x.dtype)
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {got}")


def check_weight(weight, bias, x):
    """weight (D, W) of any float type, bias (D,) of weight's type."""
    _tensor("weight", weight)
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or not 2 <= weight.shape[1] <= 4:
        raise ValueError(
            f"weight: expected shape ({channels}, W) with W from 2 to 4, got {tuple(weight.shape)}"
        )
    check_like(
        "weight", weight, x, weight.shape, (*FLOATS, torch.float64) if x.dtype == torch.float64 else FLOATS
    )
    if bias is not None:
        check_like("bias", bias, x, (channels,), (weight.dtype,), "the type of weight")


def check_like(name, value, x, shape, dtypes, hint=None):
    """Type, device, shape and dtype of one tensor argument."""
    _tensor(name, value)
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} (that of x), got {value.device}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        accepted = " or ".join(_short(d) for d in dtypes)
        raise TypeError(
            f"{name}: expected {accepted}{f' ({hint})' if hint else ''}, got {_short(value.dtype)}"
        )


def check_state(conv_state, conv_state_indices, x, width):
    """conv_state (B, D, S), or (entries, D, S) with indices; S >= W - 1."""
    _tensor("conv_state", conv_state)
    batch, channels = x.shape[:2]
    rows = "B or more" if conv_state_indices is not None else batch
    fits = conv_state.dim() == 3 and conv_state.shape[1] == channels and conv_state.shape[2] >= width - 1
    if not fits or (conv_state_indices is None and conv_state.shape[0] != batch):
        raise ValueError(
            f"conv_state: expected shape ({rows}, {channels}, S) with S >= W - 1 = {width - 1}, "
            f"got {tuple(conv_state.shape)}"
        )
    check_like("conv_state", conv_state, x, conv_state.shape, (x.dtype,), "the type of x")


def check_edges(cu_seqlens, x):
    """cu_seqlens (B + 1,), where the packed sequences of x begin and the last one ends."""
    _tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    check_like("cu_seqlens", cu_seqlens, x, cu_seqlens.shape, INTEGERS)


def _tensor(name, value):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _short(dtype):
    return str(dtype).removeprefix("torch.")
