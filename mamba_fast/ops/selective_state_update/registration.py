"""The update as a PyTorch operator that changes `state`, so that torch.compile and fake tensors know it."""

import importlib

import torch
from torch import Tensor

_ROOMS = {"torch": "torch_update", "triton": "triton_update"}


def room(backend):
    return importlib.import_module(f"{__package__}.{_ROOMS[backend]}")


@torch.library.custom_op("mamba_fast::selective_state_update", mutates_args=("state",))
def update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, softplus: bool, indices: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    """y of checked arguments; the new states stand in `state`."""
    return room(backend).update(state, x, dt, A, B, C, D, z, dt_bias, softplus, indices)


@update.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, softplus, indices, backend):
    return x.new_empty(x.shape)
