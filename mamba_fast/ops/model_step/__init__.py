"""One token through the whole language model in few launches, or one. See README.md in this folder."""

import torch

from mamba_fast import nvrtc
from mamba_fast.ops.model_step.arguments import LayerWeights, Weights, obstacle, obstacle_to_rows
from mamba_fast.ops.next_token import greedy_token

__all__ = ["LayerWeights", "Weights", "model_step"]


def model_step(weights, tokens, states, slots=None, columns=None):
    """logits (B, V) of the next token after tokens (B,) int64, or None where it has to go op by op.

    h ← exp(Δ A) h + Δ B u and all around it, for every layer (Algorithm 2 for a single t, figure 3). On an
    NVIDIA GPU of compute capability 9.0 or later, without gradients: for up to 8 sequences as one launch
    (extra `cuda`), for up to 128 as six a layer, each begun while the one before it ends.

    Parameters
    ----------
    weights : Weights
    states : [(conv_state (B, D, K), ssm_state (B, D, N))], one a layer, changed in place, in the type of
        the weights or float32
    slots : Slots of next_token without a penalty, or None: there the likeliest token of the first `columns`
        logits (all by default) is recorded, as greedy_token does it, by the one launch itself or one more
    columns : see slots

    Notes
    -----
    Reads every weight once and every state once, and writes the states. One launch: that is its time, with
    three waits of the whole chip for itself in a layer (four for several sequences). 2 operations a weight
    and sequence.
    """
    backends = _backends(tokens)
    if "cuda" in backends and nvrtc.available() and obstacle(weights, tokens, states) is None:
        from mamba_fast.ops.model_step import cuda_step

        logits = cuda_step.step(weights, tokens, states, slots, columns)
        if logits is not None:
            return logits
    if "triton" not in backends or obstacle_to_rows(weights, tokens, states) is not None:
        return None
    from mamba_fast.ops.model_step import triton_step

    logits = triton_step.step(weights, tokens, states)
    if slots is not None:
        greedy_token(logits[:, :columns], slots)
    return logits


def _backends(tokens):
    """Copies by the memory system, and kernels that begin early: NVIDIA, from compute capability 9.0 on."""
    if not tokens.is_cuda or torch.version.hip or torch.cuda.get_device_capability(tokens.device) < (9, 0):
        return ()
    from mamba_fast.ops.selective_scan.backends import available_backends

    return available_backends(tokens.device)
