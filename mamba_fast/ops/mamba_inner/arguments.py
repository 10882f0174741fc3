"""What the public function accepts: every check."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check(t, level):
    """ValueError or TypeError name the argument that is wrong, what came and what is accepted."""
    if level not in (0, 1):
        raise ValueError(f"checkpoint_lvl: expected 0 or 1, got {level!r}")
    xz = t.xz
    _tensor("xz", xz, xz)
    if xz.dim() != 3 or xz.shape[1] % 2:
        raise ValueError(f"xz: expected shape (B, 2D, L), got {tuple(xz.shape)}")
    wide = (torch.float64,) if xz.dtype == torch.float64 else ()
    floats = (*FLOATS, *wide)
    if xz.dtype not in floats:
        raise TypeError(f"xz: expected float32, float16, bfloat16 or float64, got {_name(xz.dtype)}")
    channels = xz.shape[1] // 2
    complex_types = (torch.complex64, torch.complex128) if wide else (torch.complex64,)
    _like("A", t.A, xz, (channels, None), (torch.float32, *wide, *complex_types))
    states = t.A.shape[1]
    _like("conv1d_weight", t.conv_weight, xz, (channels, 1, None), floats)
    if not 2 <= t.conv_weight.shape[2] <= 4:
        raise ValueError(f"conv1d_weight: expected W from 2 to 4, got shape {tuple(t.conv_weight.shape)}")
    _like("delta_proj_weight", t.delta_proj, xz, (channels, None), floats)
    rows = states * (2 if t.A.is_complex() else 1)
    variable = (t.B is None) + (t.C is None)
    _like("x_proj_weight", t.x_proj, xz, (t.delta_proj.shape[1] + variable * rows, channels), floats)
    _like("out_proj_weight", t.out_proj, xz, (None, channels), floats)
    _check_vectors(t, channels, states, rows, floats, wide)
    for name, value in (("B", t.B), ("C", t.C)):
        if value is not None:
            _check_matrix(name, value, xz, t.A, states)


def _check_vectors(t, channels, states, rows, floats, wide):
    singles = (torch.float32, *wide)
    optional = (
        ("conv1d_bias", t.conv_bias, channels, (t.conv_weight.dtype,)),
        ("out_proj_bias", t.out_bias, t.out_proj.shape[0], floats),
        ("D", t.D, channels, singles),
        ("delta_bias", t.delta_bias, channels, singles),
        ("B_proj_bias", t.B_bias, rows, floats),
        ("C_proj_bias", t.C_bias, rows, floats),
        ("b_rms_weight", t.B_rms, states, floats),
        ("c_rms_weight", t.C_rms, states, floats),
        ("dt_rms_weight", t.delta_rms, channels, floats),
    )
    for name, value, size, types in optional:
        if value is not None:
            _like(name, value, t.xz, (size,), types)
    for name, value in (("b_rms_weight", t.B_rms), ("c_rms_weight", t.C_rms)):
        if value is not None and t.A.is_complex():
            raise ValueError(f"{name}: expected None beside a complex A, got shape {tuple(value.shape)}")
    for names, bias, rms, given in (
        (("B", "B_proj_bias", "b_rms_weight"), t.B_bias, t.B_rms, t.B),
        (("C", "C_proj_bias", "c_rms_weight"), t.C_bias, t.C_rms, t.C),
    ):
        for name, value in zip(names[1:], (bias, rms), strict=True):
            if value is not None and given is not None:
                raise ValueError(
                    f"{name}: belongs to the {names[0]} that comes from x, but {names[0]} is given"
                )


def _check_matrix(name, value, xz, A, states):
    """B or C as the scan takes it: (D, N) in A's type, (B, N, L) or (B, G, N, L) in xz's."""
    _tensor(name, value, xz)
    batch, channels, seqlen = xz.shape[0], xz.shape[1] // 2, xz.shape[2]
    if value.dim() == 2:
        _like(name, value, xz, (channels, states), (A.dtype,))
        return
    length = seqlen * (2 if A.is_complex() else 1)
    shape = (batch, states, length) if value.dim() == 3 else (batch, None, states, length)
    _like(name, value, xz, shape, (xz.dtype,))
    if value.dim() == 4 and (value.shape[1] == 0 or channels % value.shape[1]):
        raise ValueError(f"{name}: the number of groups must divide D = {channels}, got G = {value.shape[1]}")


def with_group_axis(v):
    """B or C in any published form as (B or 1, G, N, L or 1)."""
    if v is None or v.dim() == 4:
        return v
    return v[None, :, :, None] if v.dim() == 2 else v[:, None]


def _tensor(name, value, xz):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.device != xz.device:
        raise ValueError(f"{name}: expected device {xz.device} (that of xz), got {value.device}")


def _like(name, value, xz, shape, dtypes):
    """Type, device, shape (None: any size) and dtype of one tensor argument."""
    _tensor(name, value, xz)
    if value.dim() != len(shape) or any(w not in (None, s) for s, w in zip(value.shape, shape, strict=True)):
        wanted = ", ".join("any" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        accepted = " or ".join(map(_name, dtypes))
        raise TypeError(f"{name}: expected {accepted}, got {_name(value.dtype)}")


def _name(dtype):
    return str(dtype).removeprefix("torch.")
