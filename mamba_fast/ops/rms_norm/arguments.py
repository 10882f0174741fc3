"""What the public functions accept of the published signature."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(x, weight, bias, residual):
    """ValueError or TypeError name the argument that is wrong, what came and what is accepted."""
    _float("x", x, x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., M), got ()")
    _like("weight", weight, x, x.shape[-1:])
    if bias is not None:
        _like("bias", bias, x, x.shape[-1:])
    if residual is not None:
        _like("residual", residual, x, x.shape)


def refuse(x1, weight1, bias1, dropout_p, rowscale, return_dropout_mask):
    """ValueError for what the published functions do for other models and these do not."""
    if x1 is not None:
        raise ValueError(_not_none("x1", "a second input", x1))
    if weight1 is not None:
        raise ValueError(_not_none("weight1", "a second norm of the same sum", weight1))
    if bias1 is not None:
        raise ValueError(_not_none("bias1", "a second norm of the same sum", bias1))
    if rowscale is not None:
        raise ValueError(_not_none("rowscale", "a factor a row", rowscale))
    refuse_dropout(dropout_p)
    if return_dropout_mask:
        raise ValueError(
            f"return_dropout_mask: expected False (there is no dropout), got {return_dropout_mask}"
        )


def refuse_dropout(dropout_p):
    if dropout_p != 0:
        raise ValueError(f"dropout_p: expected 0.0 (dropout is not supported), got {dropout_p}")


def _not_none(name, reason, value):
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return f"{name}: expected None ({reason} is not supported), got {got}"


def _float(name, value, x):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} (that of x), got {value.device}")
    if value.dtype not in FLOATS:
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {got}")


def _like(name, value, x, shape):
    _float(name, value, x)
    if value.shape != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")
