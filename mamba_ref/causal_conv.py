"""The short causal convolution in front of the scan: each channel alone, K taps that look back.

Paper: section 3.4, figure 3 (the block). Along a sequence it is a sum over taps; one token at a
time it is a shift register that holds the last K inputs.
"""

import numpy as np
import torch
import torch.nn.functional as F


def causal_conv_numpy(x, weight, bias=None, activation=None, *, initial_state=None, return_last_state=False):
    """The oracle, in float64: y_t = bias + sum_k weight_k x_{t - (K - 1) + k}, then SiLU if asked for.

    x: (B, D, L). weight: (D, K), whose last tap multiplies the present token. bias: (D,). activation:
    None or "silu". initial_state: (B, D, K), the last K inputs before this sequence, oldest first (the
    oldest one is already out of reach); zeros when not given.

    Returns y (B, D, L), and last_state (B, D, K) where asked for. Raises ValueError for a wrong shape
    or activation. Costs 2 B D L K operations and, read and written once, 16 B D L bytes.
    """
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    _validate(x, weight, activation, initial_state)
    d_conv, seqlen = weight.shape[1], x.shape[2]
    past = (
        np.zeros((*x.shape[:2], d_conv)) if initial_state is None else np.asarray(initial_state, np.float64)
    )
    seen = np.concatenate([past, x], -1)  # (B, D, K + L): token t stands at K + t
    y = sum(weight[:, k, None] * seen[..., k + 1 : k + 1 + seqlen] for k in range(d_conv))
    if bias is not None:
        y = y + np.asarray(bias, np.float64)[:, None]
    if activation == "silu":
        y = y / (1 + np.exp(-y))
    return (y, seen[..., seqlen:]) if return_last_state else y


def causal_conv(x, weight, bias=None, activation=None, *, initial_state=None, return_last_state=False):
    """The same sum over taps in PyTorch: y_t = bias + sum_k weight_k x_{t - (K - 1) + k}.

    Shapes, results and errors as in :func:`causal_conv_numpy`. Half types are read as float32 and y is
    rounded to x's type once, at the end; last_state has x's type. Differentiable in every argument.
    """
    _validate(x, weight, activation, initial_state)
    d_conv, seqlen = weight.shape[1], x.shape[2]
    past = x.new_zeros(*x.shape[:2], d_conv) if initial_state is None else initial_state.to(x.dtype)
    seen = torch.cat([past, x], -1)  # (B, D, K + L): token t stands at K + t
    wide = torch.promote_types(x.dtype, torch.float32)
    y = sum(weight[:, k, None].to(wide) * seen[..., k + 1 : k + 1 + seqlen].to(wide) for k in range(d_conv))
    if bias is not None:
        y = y + bias[:, None].to(wide)
    y = (F.silu(y) if activation == "silu" else y).to(x.dtype)
    return (y, seen[..., seqlen:]) if return_last_state else y


def causal_conv_step(x, conv_state, weight, bias=None, activation=None):
    """One token through a K-tap shift register s: drop the oldest, append x, y = bias + sum_k weight_k s_k.

    x: (B, D). conv_state: (B, D, K), the last K inputs, oldest first; as wide as the published code keeps
    it, though K - 1 would do. Returns y (B, D) and the new conv_state; the old one is left as it was.
    Raises ValueError for a wrong shape or activation. Costs 2 B D K operations, whatever came before.
    """
    _validate(x[..., None], weight, activation, conv_state)
    conv_state = torch.cat([conv_state[..., 1:], x[..., None].to(conv_state.dtype)], -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (weight.to(wide) * conv_state.to(wide)).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), conv_state


def _validate(x, weight, activation, state):
    if weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; accepted: (D, K) with D = {x.shape[1]}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: got {activation!r}; accepted: None or 'silu'")
    wanted = (*x.shape[:2], weight.shape[1])
    if state is not None and tuple(state.shape) != wanted:
        raise ValueError(f"conv state: got shape {tuple(state.shape)}; accepted: (B, D, K) = {wanted}")
