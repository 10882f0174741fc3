"""What `linear_cross_entropy_fn` accepts."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
REDUCTIONS = ("mean", "sum", "none")


def check(hidden_states, weight, bias, labels, ignore_index, reduction, vocab_size):
    """ValueError or TypeError name the argument that is wrong, what came and what is accepted."""
    _tensor("hidden_states", hidden_states, hidden_states, FLOATS)
    if hidden_states.dim() == 0:
        raise ValueError("hidden_states: expected shape (..., E), got ()")
    width = hidden_states.shape[-1]
    _tensor("weight", weight, hidden_states, FLOATS)
    if weight.dim() != 2 or weight.shape[1] != width or len(weight) == 0:
        raise ValueError(f"weight: expected shape (V, {width}) with V >= 1, got {tuple(weight.shape)}")
    if bias is not None:
        _tensor("bias", bias, hidden_states, FLOATS)
        _shaped("bias", bias, weight.shape[:1])
    _tensor("labels", labels, hidden_states, INTEGERS)
    _shaped("labels", labels, hidden_states.shape[:-1])
    dtype = product_dtype(hidden_states)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not _autocast(hidden_states) and value.dtype != dtype:
            raise TypeError(
                f"{name}: expected {_name(dtype)} (that of hidden_states), got {_name(value.dtype)}"
            )
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if vocab_size is not None and not 1 <= vocab_size <= len(weight):
        raise ValueError(f"vocab_size: expected None or 1 to V = {len(weight)}, got {vocab_size}")


def product_dtype(hidden_states):
    """The type of the products: autocast's where it is on, else that of hidden_states."""
    dtype = hidden_states.dtype
    if _autocast(hidden_states):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    return dtype


def check_labels(labels, vocab_size, ignore_index):
    """ValueError for a label out of range, where looking at it stops no GPU."""
    if labels.device.type == "cpu":
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))]
        if len(wrong):
            accepted = f"0 to {vocab_size - 1} or ignore_index = {ignore_index}"
            raise ValueError(f"labels: expected {accepted}, got {wrong[0].item()}")


def _autocast(hidden_states):
    return torch.is_autocast_enabled(hidden_states.device.type) and hidden_states.dtype != torch.float64


def _tensor(name, value, hidden_states, dtypes):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.device != hidden_states.device:
        raise ValueError(
            f"{name}: expected device {hidden_states.device} (that of hidden_states), got {value.device}"
        )
    if value.dtype not in dtypes:
        *most, last = map(_name, dtypes)
        raise TypeError(f"{name}: expected {', '.join(most)} or {last}, got {_name(value.dtype)}")


def _shaped(name, value, shape):
    if value.shape != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")


def _name(dtype):
    return str(dtype).removeprefix("torch.")
