"""What a step takes: the weights of a model as a list of layers; and what which of its ways cannot take."""

from typing import NamedTuple

import torch
from torch import Tensor

MOST_SEQUENCES = 8
MOST_CHANNELS = 16384  # of all sequences: with more, op by op is faster
WIDEST = 12288  # channels: eight rows of out_proj have to fit into the shared memory of a block
MOST_NUMBERS = {64: 163840, 128: 131072}  # sequences: numbers of all streams; with more, op by op is as fast
MOST_STATES = 64  # of a channel, in the registers of its program
TAPS = 4
TYPES = (torch.float16, torch.bfloat16)


class LayerWeights(NamedTuple):
    """One layer, in the order of struct Layer in model_step.cu; E = d_model, D = d_inner."""

    norm: Tensor  # (E,)
    in_proj: Tensor  # (2 D, E)
    conv: Tensor  # (D, K)
    conv_bias: Tensor | None  # (D,)
    x_proj: Tensor  # (R + 2 N, D)
    dt_proj: Tensor  # (D, R)
    dt_bias: Tensor  # (D,)
    A_log: Tensor  # (D, N) float32
    D: Tensor  # (D,) float32
    out_proj: Tensor  # (E, D)


class Weights(NamedTuple):
    """A whole model; V is the padded vocabulary."""

    layers: tuple  # of LayerWeights
    embedding: Tensor  # (V, E)
    norm_f: Tensor  # (E,)
    head: Tensor  # (V, E)
    eps: float

    @property
    def d_state(self):
        return self.layers[0].A_log.shape[1]

    @property
    def dt_rank(self):
        return self.layers[0].dt_proj.shape[1]


def obstacle(weights, tokens, states):
    """Why the one kernel cannot take this step, or None. Reads sizes, types and places, no values."""
    batch, d_inner = len(tokens), weights.layers[0].D.shape[0] if weights.layers else 0
    if not 1 <= batch <= MOST_SEQUENCES:
        return f"it takes 1 to {MOST_SEQUENCES} sequences, and there are {batch}"
    if d_inner > WIDEST:
        return f"it takes up to {WIDEST} channels, and there are {d_inner}"
    if batch * d_inner > MOST_CHANNELS:
        return f"it is slower for {batch} x {d_inner} channels"
    return _obstacle_to_both(weights, tokens, states)


def obstacle_to_rows(weights, tokens, states):
    """Why the kernels for many sequences cannot take this step, or None."""
    batch, d_model = len(tokens), weights.head.shape[1]
    if not 1 <= batch <= max(MOST_NUMBERS):
        return f"they take 1 to {max(MOST_NUMBERS)} sequences, and there are {batch}"
    if batch * d_model > next(most for rows, most in MOST_NUMBERS.items() if batch <= rows):
        return f"they are no faster for {batch} x {d_model} numbers"
    if weights.layers and weights.layers[0].conv.shape[1] != TAPS:
        return f"they take {TAPS} taps, and there are {weights.layers[0].conv.shape[1]}"
    if weights.layers and weights.d_state > MOST_STATES:
        return f"they take up to {MOST_STATES} states, and there are {weights.d_state}"
    return _obstacle_to_both(weights, tokens, states)


def _obstacle_to_both(weights, tokens, states):
    dtype = weights.head.dtype
    if tokens.dtype != torch.int64:
        return f"tokens are {tokens.dtype}, not int64"
    if not weights.layers:
        return "the model has no layer"
    if dtype not in TYPES:
        return f"the weights are {dtype}, not float16 or bfloat16"
    first = _shapes(weights.layers[0])
    if any(_shapes(layer) != first for layer in weights.layers):
        return "the layers have several sizes, or some of them a bias of the convolution"
    d_model, d_inner = weights.head.shape[1], weights.layers[0].D.shape[0]
    kept = [(len(tokens), d_inner, n) for n in (weights.layers[0].conv.shape[1], weights.d_state)]
    if any(tuple(v.shape) != shape for pair in states for v, shape in zip(pair, kept, strict=True)):
        return f"the states have other shapes than {kept[0]} and {kept[1]}"
    if any(size % 8 for size in (d_model, d_inner, weights.dt_rank, weights.dt_rank + 2 * weights.d_state)):
        return "d_model, d_inner, dt_rank and dt_rank + 2 N have to be multiples of 8"
    plain = [weights.embedding, weights.norm_f, weights.head]
    single = []
    for layer in weights.layers:
        single += (layer.A_log, layer.D)
        plain += (v for v in layer if v is not None and v is not layer.A_log and v is not layer.D)
    kept = {v.dtype for pair in states for v in pair}
    everything = [tokens, *plain, *single, *(v for pair in states for v in pair)]
    if any(v.dtype != dtype for v in plain) or any(v.dtype != torch.float32 for v in single):
        return "the weights have several types"
    if len(kept) != 1 or not kept <= {dtype, torch.float32}:
        return f"the states have the types {sorted(map(str, kept))} beside weights of {dtype}"
    if any(not v.is_contiguous() or v.device != tokens.device for v in everything):
        return "something is not contiguous, or on another device"
    return "an address is no multiple of 16 bytes" if any(v.data_ptr() % 16 for v in plain) else None


def _shapes(layer):
    return [None if v is None else v.shape for v in layer]
