"""One token through the whole language model in one launch. See README.md in this folder."""

import torch

from mamba_fast import nvrtc
from mamba_fast.ops.model_step.arguments import LayerWeights, Weights, obstacle

__all__ = ["LayerWeights", "Weights", "model_step"]


def model_step(weights, tokens, states):
    """logits (B, V) of the next token after tokens (B,) int64, or None where the one kernel cannot take it.

    h ← exp(Δ A) h + Δ B u and all around it, for every layer (Algorithm 2 for a single t, figure 3). On an
    NVIDIA GPU of compute capability 9.0 or later, with the extra `cuda`, for up to 8 sequences; without
    gradients.

    Parameters
    ----------
    weights : Weights
    states : [(conv_state (B, D, K), ssm_state (B, D, N))], one a layer, changed in place, in the type of
        the weights or float32

    Notes
    -----
    Reads every weight once and every state once, and writes the states: that is its time, with three
    waits of the whole chip for itself in a layer (four for several sequences). 2 operations a weight and
    sequence.
    """
    if obstacle(weights, tokens, states) is not None or not _on_gpu(tokens):
        return None
    from mamba_fast.ops.model_step import cuda_step

    return cuda_step.step(weights, tokens, states)


def _on_gpu(tokens):
    from mamba_fast.ops.selective_scan.backends import available_backends

    return (
        tokens.is_cuda
        and nvrtc.available()
        and "cuda" in available_backends(tokens.device)
        and torch.cuda.get_device_capability(tokens.device) >= (9, 0)  # copies by the memory system
    )
