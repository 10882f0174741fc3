"""Which models take a step whole: the published ones, as long as nobody has changed their parts."""

import torch
from torch import nn

from mamba_fast.block import Block
from mamba_fast.mixer import Mamba
from mamba_fast.ops.model_step import LayerWeights, Weights, model_step
from mamba_fast.ops.rms_norm import RMSNorm


def whole_step(model, input_ids, inference_params, slots=None, columns=None):
    """logits (B, 1, V) of the next token of every sequence, or None where the model goes layer by layer.

    As :func:`model_step`, whose limits hold; `slots` are for a model whose own forward nobody has changed.
    Besides: RMSNorm with the residual stream in float32, no MLP, no biases but those of the convolution and
    of Δ; no module replaced by another, none with a hook.
    """
    if (
        inference_params is None
        or inference_params.seqlen_offset == 0
        or input_ids.shape[1:] != (1,)
        or not input_ids.is_cuda
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cuda")
        or torch.compiler.is_compiling()
    ):
        return None
    if slots is not None and not _unchanged(model):
        return None
    weights = _weights(model)
    if weights is None:
        return None
    states = [
        block.mixer._get_states_from_cache(inference_params, len(input_ids))
        for block in model.backbone.layers
    ]
    logits = model_step(weights, input_ids[:, 0].long().contiguous(), states, slots, columns)
    return None if logits is None else logits[:, None]


def _weights(model):
    """The Weights of a model whose step can be taken whole, or None."""
    from mamba_fast.model import MixerModel

    backbone = model.backbone
    ends = (backbone, backbone.embedding, backbone.norm_f, model.lm_head)
    kinds = (MixerModel, nn.Embedding, RMSNorm, nn.Linear)
    if not (_plain(ends, kinds) and backbone.fused_add_norm and backbone.residual_in_fp32):
        return None
    if model.lm_head.bias is not None:
        return None
    layers = []
    for block in backbone.layers:
        layer = _layer(block, backbone.norm_f.eps)
        if layer is None:
            return None
        layers.append(layer)
    tables = (backbone.embedding.weight, backbone.norm_f.weight, model.lm_head.weight)
    return Weights(tuple(layers), *tables, backbone.norm_f.eps)


def _layer(block, eps):
    if type(block) is not Block or block.mlp is not None or type(block.mixer) is not Mamba:
        return None
    if not (block.fused_add_norm and block.residual_in_fp32 and block.norm.eps == eps):
        return None
    mixer = block.mixer
    linear = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    parts = (block, mixer, block.norm, mixer.conv1d, *linear)
    if not _plain(parts, (Block, Mamba, RMSNorm, nn.Conv1d, *[nn.Linear] * 4)):
        return None
    if any(v.bias is not None for v in (mixer.in_proj, mixer.x_proj, mixer.out_proj)):
        return None
    return LayerWeights(
        block.norm.weight, mixer.in_proj.weight, mixer.conv1d.weight[:, 0], mixer.conv1d.bias,
        mixer.x_proj.weight, mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log, mixer.D,
        mixer.out_proj.weight,
    )  # fmt: skip


def _unchanged(model):
    """Whether calling it runs MambaLMHeadModel's forward and nothing else."""
    from mamba_fast.model import MambaLMHeadModel

    compiled = getattr(model, "_compiled_call_impl", None) is not None
    return not compiled and _plain((model,), (MambaLMHeadModel,))


def _plain(modules, kinds):
    """Whether these are exactly of these kinds, without hooks and without a forward of their own."""
    return all(
        type(m) is kind and not m._forward_hooks and not m._forward_pre_hooks and "forward" not in vars(m)
        for m, kind in zip(modules, kinds, strict=True)
    )
