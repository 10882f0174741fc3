"""The steps of a block over whole sequences, with time last: (B, D, L) and no copies in between."""

import torch
import torch.nn.functional as F
from torch import nn

from mamba_fast.ops.causal_conv1d import causal_conv1d_fn

SHORT = 64  # up to so many tokens a row, one product for the whole batch: a product a row would be small


def wide(v):
    """At least float32: what A, D and the bias of Δ are, whatever the type of the layers."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def room_of(backend):
    """What the convolution, the step and the norm take for this backend of the scan."""
    return backend if backend in ("torch", "triton") else None


def convolve(x, conv1d, conv_state, layout, room):
    """u = SiLU(conv(x)) (B, D, L), with the inputs before it, each sequence alone, 0 at padding."""
    weight, width = conv1d.weight[:, 0], conv1d.weight.shape[2]
    past = None if conv_state is None else conv_state[..., 1:].to(x.dtype)  # the oldest is out of reach
    by_edges = layout.cu_seqlens is not None
    u = causal_conv1d_fn(
        x, weight, conv1d.bias, layout.conv_seq, None if by_edges else past, activation="silu", backend=room
    )
    if past is None or not by_edges:
        return u
    # The first K - 1 tokens of each sequence once more, with what came before it: (S, D, K - 1).
    reach = torch.arange(width - 1, device=x.device)
    token = (layout.cu_seqlens[:-1, None] + reach).clamp(max=x.shape[2] - 1)
    heads = x[0][:, token].transpose(0, 1).contiguous()
    heads = causal_conv1d_fn(heads, weight, conv1d.bias, initial_states=past, activation="silu", backend=room)
    seq, place = layout.conv_seq[0].long(), layout.place.clamp(max=width - 2)
    heads = heads.transpose(0, 1)[:, seq, place]  # (D, L)
    return torch.where(layout.place < width - 1, heads, u)


def last_inputs(x, conv_state, layout, width):
    """conv_state (rows, D, K): the last K inputs of each row's sequence, oldest first, zeros before it."""
    if layout.plain or layout.begins:
        seqlen = x.shape[2]
        if layout.begins:
            x = x[..., -width:].masked_fill(layout.pad[..., -width:], 0)
        if seqlen >= width:
            return x[..., -width:]
        past = x.new_zeros(*x.shape[:2], width) if conv_state is None else conv_state.to(x.dtype)
        return torch.cat([past[..., seqlen:], x], -1)
    window = layout.window
    if layout.cu_seqlens is not None:
        new = x[0][:, window.token].transpose(0, 1)
    else:
        new = x.gather(2, window.token[:, None].expand(-1, x.shape[1], -1))
    zero = new.new_zeros(())
    if conv_state is None:
        return torch.where(window.live[:, None], new, zero)
    old = conv_state.to(x.dtype).gather(2, window.past[:, None].expand(-1, x.shape[1], -1))
    return torch.where(window.live[:, None], new, torch.where(window.inherits[:, None], old, zero))


def project(linear, v):
    """W v for v (B, I, L): (B, O, L). `linear` is a weight (O, I), or a layer without a bias."""
    if isinstance(linear, nn.Module) and type(linear) is not nn.Linear:
        return linear(v.mT).mT
    weight = linear.weight if isinstance(linear, nn.Module) else linear
    if v.shape[2] <= SHORT:
        return F.linear(v.mT, weight).mT
    return torch.bmm(weight.expand(len(v), -1, -1), v)


def before_bias(dt_proj, dt):
    """delta (B, D, L) of dt (B, R, L), or (B, D) of (B, R), without its bias: the scan adds it in float32."""
    step = dt.dim() == 2
    if type(dt_proj) is nn.Linear:
        return F.linear(dt, dt_proj.weight) if step else project(dt_proj.weight, dt)
    delta = dt_proj(dt if step else dt.mT)  # a layer that a library has put in its place
    delta = (delta - dt_proj.bias).to(delta.dtype)
    return delta if step else delta.mT


def narrow(linear, y):
    """out_proj of y (B, D, L): (B, L, d_model)."""
    if type(linear) is not nn.Linear or y.shape[2] <= SHORT:
        return linear(y.mT)
    weight = linear.weight.T.expand(len(y), -1, -1)
    return (
        torch.bmm(y.mT, weight)
        if linear.bias is None
        else torch.baddbmm(linear.bias.to(y.dtype), y.mT, weight)
    )
