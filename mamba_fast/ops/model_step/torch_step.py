"""One token through the whole model, op by op: any device, any float type."""

import torch
import torch.nn.functional as F

from mamba_fast.ops.causal_conv1d import causal_conv1d_update
from mamba_fast.ops.rms_norm import rms_norm_fn
from mamba_fast.ops.selective_state_update import selective_state_update


def step(weights, tokens, states):
    """logits (B, V) of tokens (B,); states [(conv_state, ssm_state)] are changed in place."""
    hidden_states, residual = F.embedding(tokens, weights.embedding), None
    for layer, (conv_state, ssm_state) in zip(weights.layers, states, strict=True):
        hidden_states, residual = rms_norm_fn(
            hidden_states, layer.norm, None, residual, eps=weights.eps, prenorm=True, residual_in_fp32=True,
            backend="torch",
        )  # fmt: skip
        x, z = F.linear(hidden_states, layer.in_proj).chunk(2, -1)
        taps, bias = (None if v is None else v.to(conv_state.dtype) for v in (layer.conv, layer.conv_bias))
        u = causal_conv1d_update(x.to(conv_state.dtype), conv_state, taps, bias, "silu", backend="torch")
        u = u.to(x.dtype)
        d_state = layer.A_log.shape[1]
        rows = F.linear(u, layer.x_proj)
        dt, B, C = rows.split([rows.shape[1] - 2 * d_state, d_state, d_state], -1)
        y = selective_state_update(
            ssm_state, u, F.linear(dt, layer.dt_proj), -torch.exp(layer.A_log), B, C, layer.D, z=z,
            dt_bias=layer.dt_bias, dt_softplus=True, backend="torch",
        )  # fmt: skip
        hidden_states = F.linear(y, layer.out_proj)
    hidden_states = rms_norm_fn(
        hidden_states, weights.norm_f, None, residual, eps=weights.eps, backend="torch"
    )
    return F.linear(hidden_states, weights.head)
