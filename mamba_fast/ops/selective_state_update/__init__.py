"""One token through the recurrence, the state changed in place. See README.md in this folder."""

import torch

from mamba_fast.ops import rooms
from mamba_fast.ops.selective_state_update import registration
from mamba_fast.ops.selective_state_update.arguments import check, check_values

__all__ = ["selective_state_update"]


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None,
    *, backend=None,
):  # fmt: skip
    """h ← exp(Δ A) h + Δ B x in place, y = C h + D x, then y SiLU(z): one step of the selective scan.

    Parameters
    ----------
    state : (B, P, N), or with heads (B, H, P, N), any float type; updated in place, in its own type
    x, dt, z : (B, P) or (B, H, P), any float type. Δ = dt + dt_bias.
    A : (P, N) or (H, P, N)
    B, C : (B, N), or (B, G, N): group g serves heads h with h // (H / G) == g
    D, dt_bias : (P,) or (H, P)
    dt_softplus : Δ = softplus(dt + dt_bias), the identity above 20
    state_batch_indices : (B,) int32 or int64, the row of `state` that each row of x belongs to; `state`
        then has any number of rows. No row twice. Negative: padding, y is 0 and no state changes.
        Values are checked when the tensor lives on the CPU.
    backend : None (Triton on a GPU, else PyTorch), "torch" or "triton"

    Returns
    -------
    y (B, P) or (B, H, P) in x's type, from the new state before it is rounded to its own type.
    Not differentiable: backward through y raises RuntimeError.

    Raises
    ------
    TypeError, ValueError : name the argument, what came and what is accepted

    Notes
    -----
    About 6 B H P N operations in float32 (float64 where an argument is float64), B H P N exponentials;
    B H exponentials where A, dt and dt_bias are one number a head (stride 0, by `expand`). Moves
    2 B H P N numbers of the state and 4 B H P of x, dt, z and y.
    """
    check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    given = (state, x, dt, A, B, C, D, z, dt_bias)
    name = rooms.choose("selective_state_update", x, given, backend)
    args = (*given, bool(dt_softplus), state_batch_indices)
    if torch.compiler.is_compiling():
        return registration.update(*args, name)
    check_values(state_batch_indices, state.shape[0])
    if type(state) is not torch.Tensor or _wants_gradients(given):
        return registration.update(*args, name)
    y = registration.room(name).update(*args)  # what the operator does, without the price of its dispatch
    if name == "triton" and not state.is_inference():
        torch.autograd.graph.increment_version(state)  # autograd sees PyTorch's changes alone
    return y


def _wants_gradients(tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
