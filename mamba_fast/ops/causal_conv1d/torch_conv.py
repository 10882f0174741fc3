"""The causal convolution in vectorised PyTorch: any device, any float type, twice differentiable."""

import torch
import torch.nn.functional as F


def causal_conv_torch(x, weight, bias, seq_idx, initial_states, silu):
    """y (B, D, L) by one shifted product a tap. About 2 B D L W operations, and W passes over x."""
    compute = torch.promote_types(x.dtype, torch.float32)
    seqlen, width = x.shape[2], weight.shape[1]
    past = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    seen = torch.cat([past, x], -1).to(compute)  # step t stands at t + W - 1
    weight = weight.to(compute)
    reach = None if seq_idx is None else reach_torch(seq_idx, width)[:, None]
    y = 0
    for k in range(width):
        part = seen[..., k : k + seqlen]
        if reach is not None:
            part = torch.where(reach >= width - 1 - k, part, 0)
        y = y + weight[:, k, None] * part
    if bias is not None:
        y = y + bias.to(compute)[:, None]
    y = F.silu(y) if silu else y
    y = (y if reach is None else torch.where(reach < 0, 0, y)).to(x.dtype)
    return y.contiguous() if x.is_contiguous() else y


def reach_torch(seq_idx, width):
    """(B, L): how many of the width - 1 steps before a step are of its sequence; -1 where it is padding.

    What comes before the row counts as its first sequence: the initial states, or zeros.
    """
    seqlen = seq_idx.shape[1]
    padded = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], 1)
    same = torch.ones_like(seq_idx, dtype=torch.bool)
    reach = torch.zeros_like(seq_idx)
    for j in range(1, width):
        same = same & (padded[:, width - 1 - j : width - 1 - j + seqlen] == seq_idx)
        reach = reach + same
    return torch.where(seq_idx < 0, -1, reach)


def final_states_torch(x, width, seq_idx, initial_states):
    """(B, D, W - 1): the last inputs of the row's last sequence, oldest first; zeros where it has fewer."""
    if initial_states is None:
        states = F.pad(x[..., max(x.shape[2] - width + 1, 0) :], (max(width - 1 - x.shape[2], 0), 0))
    else:
        states = torch.cat([initial_states, x[..., max(x.shape[2] - width + 1, 0) :]], -1)[..., 1 - width :]
    if seq_idx is None:
        return states.clone()
    return torch.where(in_last_sequence(seq_idx, width)[:, None], states, 0)


def in_last_sequence(seq_idx, width):
    """(B, W - 1): which of the last W - 1 steps are of the row's last sequence and no padding."""
    if seq_idx.shape[1] == 0:
        return seq_idx.new_ones(seq_idx.shape[0], width - 1, dtype=torch.bool)
    tail = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], 1)[:, 1 - width :]
    last = seq_idx[:, -1:]
    unbroken = (tail == last).flip(1).to(torch.int32).cumprod(1).flip(1)
    return (unbroken != 0) & (last >= 0)


def update_torch(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, pad_slot_id):
    """y of the tokens x (B, D, T); conv_state (entries, D, S) takes them in, in place."""
    compute = torch.promote_types(x.dtype, torch.float32)
    (batch, _, tokens), width, state_len = x.shape, weight.shape[1], conv_state.shape[2]
    steps = torch.arange(state_len + tokens, device=x.device)[None]
    head = steps.new_zeros(batch, 1) if cache_seqlens is None else (cache_seqlens % state_len).long()[:, None]
    entry = torch.arange(batch, device=x.device)
    alive = torch.ones_like(entry, dtype=torch.bool)
    if conv_state_indices is not None:
        entry = conv_state_indices.long()
        alive = (entry >= 0) & (entry != pad_slot_id)
    entry = entry[alive]  # padding changes no state
    old = conv_state[entry].gather(2, _slots((head[alive] + steps[:, :state_len]) % state_len, x))
    seen = torch.cat([old, x[alive]], -1)  # oldest first
    last = (head[alive] + tokens + steps[:, :state_len]) % state_len
    place = last if cache_seqlens is not None else steps[:, :state_len].expand(len(entry), -1)
    conv_state[entry] = torch.empty_like(old).scatter_(2, _slots(place, x), seen[..., tokens:])
    window = seen[..., state_len - width + 1 :].to(compute)
    y = sum(weight[:, k, None].to(compute) * window[..., k : k + tokens] for k in range(width))
    y = y if bias is None else y + bias.to(compute)[:, None]
    out = torch.zeros_like(x)
    out[alive] = (F.silu(y) if silu else y).to(x.dtype)
    return out


def _slots(index, x):
    return index[:, None].expand(-1, x.shape[1], -1)


def varlen_states_torch(x, cu_seqlens, state_len):
    """(B, D, state_len) from x (T, D): the last tokens of each sequence; zeros before them."""
    first, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    token = end - state_len + torch.arange(state_len, device=x.device)  # (B, state_len)
    if len(x) == 0:
        return x.new_zeros(len(token), state_len, x.shape[1]).transpose(1, 2)
    states = torch.where((token >= first)[..., None], x[token.clamp(min=0)], 0)
    return states.transpose(1, 2)
