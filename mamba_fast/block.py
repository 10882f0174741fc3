"""One layer of the residual stream: Add, then Norm, then Mixer; and the MLP that may stand behind it."""

import torch
import torch.nn.functional as F
from torch import nn

from mamba_fast.ops.rms_norm import RMSNorm, layer_norm_fn
from mamba_fast.sequence import room_of


class Block(nn.Module):
    """residual ← residual + hidden_states, hidden_states ← mixer(norm(residual)), as published.

    dim: width of the stream. mixer_cls, mlp_cls, norm_cls: called with `dim`; nn.Identity as mlp_cls is no
    MLP. fused_add_norm: sum and norm are one operator, for LayerNorm and RMSNorm. residual_in_fp32: the
    stream is at least float32. Attributes: norm, mixer; with an MLP norm2, mlp.
    """

    def __init__(
        self, dim, mixer_cls, mlp_cls=nn.Identity, norm_cls=nn.LayerNorm, fused_add_norm=False,
        residual_in_fp32=False,
    ):  # fmt: skip
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer, self.mlp = norm_cls(dim), mixer_cls(dim), None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise TypeError(
                f"norm_cls: fused_add_norm takes LayerNorm and RMSNorm, got {type(self.norm).__name__}"
            )

    def forward(self, hidden_states, residual=None, inference_params=None, **mixer_kwargs):
        """hidden_states and residual (B, L, dim), None before the first block, to both after this one.

        mixer_kwargs go to the mixer. With return_final_states=True among them, its states are a third
        result.
        """
        room = room_of(mixer_kwargs.get("backend"))
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual, room)
        mixed = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        hidden_states, *states = mixed if mixer_kwargs.get("return_final_states") else (mixed,)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual, room)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual, *states

    def _add_norm(self, norm, hidden_states, residual, room):
        if self.fused_add_norm:
            return fused_add_norm(norm, hidden_states, residual, self.residual_in_fp32, True, room)
        residual = hidden_states if residual is None else hidden_states + residual
        hidden_states = norm(residual.to(norm.weight.dtype))
        return hidden_states, residual.to(torch.float32) if self.residual_in_fp32 else residual

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The zero states of the mixer."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def fused_add_norm(norm, hidden_states, residual, residual_in_fp32, prenorm, room):
    """:func:`layer_norm_fn` of a LayerNorm or RMSNorm module."""
    return layer_norm_fn(
        hidden_states, norm.weight, norm.bias, residual=residual, eps=norm.eps, prenorm=prenorm,
        residual_in_fp32=residual_in_fp32, is_rms_norm=isinstance(norm, RMSNorm), backend=room,
    )  # fmt: skip


class GatedMLP(nn.Module):
    """fc2 (a · act(gate)) with a, gate = fc1 x: what may stand behind a mixer, under the published names.

    hidden_features is rounded up to a multiple of multiple_of.
    """

    def __init__(
        self, in_features, hidden_features=None, out_features=None, activation=F.silu, bias=False,
        multiple_of=128, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x):
        a, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(a * self.activation(gate))
