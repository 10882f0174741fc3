"""The block between its two large projections as one operator. See README.md in this folder."""

import torch

from mamba_fast.ops import rooms
from mamba_fast.ops.mamba_inner.arguments import check, with_group_axis
from mamba_fast.ops.mamba_inner.parts import Settings, Tensors
from mamba_fast.ops.mamba_inner.registration import inner
from mamba_fast.ops.mamba_inner.torch_inner import inner_torch
from mamba_fast.ops.selective_scan import backends

__all__ = ["mamba_inner_fn"]


def mamba_inner_fn(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
    A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
    checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
    *, backend=None,
):  # fmt: skip
    """conv, SiLU, Δ, B and C from the input, scan, gate, out_proj (section 3.4, figure 3; Algorithm 2).

    Parameters
    ----------
    xz : (B, 2D, L), x and z from in_proj: float32, float16, bfloat16, or float64 (torch backend)
    conv1d_weight, conv1d_bias : (D, 1, W) with W from 2 to 4, and (D,) or None
    x_proj_weight : (R + N + N, D), rows for Δ, B and C; without those of a B or C that is given
    delta_proj_weight : (D, R)
    out_proj_weight, out_proj_bias : (E, D), and (E,) or None
    A : (D, N) float32, or complex64 (torch backend; then B and C have 2N rows: re, im of each state)
    B, C : None, or as :func:`selective_scan_fn` takes them: then they do not come from x
    D, delta_bias : (D,) float32, or None
    B_proj_bias, C_proj_bias : (N,), added to the B and C that come from x
    delta_softplus : Δ = softplus(delta + delta_bias)
    checkpoint_lvl : 1 keeps no output of conv and scan and no delta, but finds them again; 0 keeps them
    b_rms_weight, c_rms_weight, dt_rms_weight : (N,), (N,), (D,), a norm of B, C over N and of delta over D
    b_c_dt_rms_eps : added to the mean square in these norms
    backend : that of the scan, as :func:`selective_scan_fn` takes it

    Returns
    -------
    (B, L, E) in xz's type. Differentiable in every tensor; the torch backend twice. Under autocast, xz and
    the weights of the three projections are cast to its type, and nothing else is.

    Raises
    ------
    TypeError, ValueError : name the argument, what came and what is accepted

    Notes
    -----
    Operations: 2 B L D (W + R + 2N + R + E) in the convolution and the products, 6 B L D N in the scan. No
    tensor is copied to change its layout. For the backward stay xz, y (B, D, L), B, C and Δ's rank
    (B, R + 2N, L), and the states at chunk boundaries; at level 0 two more of (B, D, L).
    """
    given = Tensors(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
        B, C, D, delta_bias, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight,
    )  # fmt: skip
    check(given, checkpoint_lvl)
    given = _cast(given)
    if torch.compiler.is_compiling():
        empty = not xz.numel()  # a bool; == 0 is none where torch.compile leaves a size open
        kind = xz.device, given.xz.dtype, A.is_complex(), int(A.shape[1]), empty
        conv, scan = _rooms_at_compile_time(*kind, backend)
    else:
        conv, scan = _rooms(given.xz, A, backend)
    settings = Settings(bool(delta_softplus), int(checkpoint_lvl), float(b_c_dt_rms_eps), conv, scan)
    with torch.autocast(xz.device.type, enabled=False):
        return (inner_torch if scan == "torch" else inner)(given, settings)


def _rooms(xz, A, backend):
    """The rooms of the convolution and of the scan; plain PyTorch takes both if it takes the scan."""
    choice = backends.choose(xz, A, backend)
    backends.warn_once_if_missing(choice)
    if choice.name == "torch" or xz.numel() == 0:  # plain PyTorch knows every empty shape
        return "torch", "torch"
    wanted = "triton" if choice.name == "triton" else None
    return rooms.choose("mamba_inner_fn", xz, (xz,), wanted), choice.name


def _rooms_at_compile_time(device, dtype, complex_A, states, empty, backend):
    A = torch.empty(1, states, dtype=torch.complex64 if complex_A else torch.float32, device=device)
    return _rooms(torch.empty(0 if empty else 1, dtype=dtype, device=device), A, backend)


# torch.compile asks this function and does not look inside: what torch.compiler.assume_constant_result sets,
# which would import all of Dynamo, and with it Triton, for everybody.
_rooms_at_compile_time._dynamo_marked_constant = True


def _cast(given):
    """xz, the projections and a B or C in time in one type: autocast's, else that of xz."""
    device, dtype = given.xz.device.type, given.xz.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    names = ["xz", "x_proj", "delta_proj", "out_proj", "out_bias"]
    names += [k for k in ("B", "C") if getattr(given, k) is not None and getattr(given, k).dim() > 2]
    cast = {k: v.to(dtype) for k in names if (v := getattr(given, k)) is not None}
    given = given._replace(**cast, conv_weight=given.conv_weight[:, 0])
    return given._replace(B=with_group_axis(given.B), C=with_group_axis(given.C))
