"""The Mamba language model: an embedding, layers on a residual stream, a norm, a head (section 3.4, 4.2).

Names, parameters, initial values and arithmetic are those of the published package.
"""

import copy
from collections import namedtuple
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mamba_fast.block import Block, GatedMLP, fused_add_norm
from mamba_fast.checkpoints import load_pretrained, save_pretrained
from mamba_fast.generation import GenerationMixin
from mamba_fast.init import init_weights
from mamba_fast.layout import layout_of
from mamba_fast.loss import head_loss, next_tokens
from mamba_fast.mixer import Mamba
from mamba_fast.ops.rms_norm import RMSNorm
from mamba_fast.sequence import room_of
from mamba_fast.whole_step import whole_step

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])
CausalLMOutputWithStates = namedtuple("CausalLMOutputWithStates", ["logits", "final_states"])


def create_block(
    d_model, d_intermediate, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-5,
    rms_norm=False, residual_in_fp32=False, fused_add_norm=False, layer_idx=None, device=None, dtype=None,
):  # fmt: skip
    """A :class:`Block` as the published model builds it; ValueError for a layer that is not Mamba-1."""
    options = copy.deepcopy(ssm_cfg or {})
    kind = options.pop("layer", "Mamba1")
    if kind != "Mamba1":
        raise ValueError(f"ssm_cfg: expected layer 'Mamba1', got {kind!r}")
    if attn_layer_idx:
        raise ValueError(f"attn_layer_idx: attention layers are not supported, got {attn_layer_idx}")
    at = {"device": device, "dtype": dtype}
    mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **at)
    block = Block(
        d_model,
        partial(Mamba, layer_idx=layer_idx, **options, **at),
        mlp if d_intermediate else nn.Identity,
        norm_cls=partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **at),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


class MixerModel(nn.Module):
    """Token ids to what the head reads: embedding, n_layer blocks, norm_f."""

    def __init__(
        self, d_model, n_layer, d_intermediate, vocab_size, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None,
        norm_epsilon=1e-5, rms_norm=False, initializer_cfg=None, fused_add_norm=False, residual_in_fp32=False,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        at = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **at)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm,
                residual_in_fp32, fused_add_norm, i, **at,
            )
            for i in range(n_layer)
        )  # fmt: skip
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **at)
        residuals = {"n_residuals_per_layer": 2 if d_intermediate else 1}
        self.apply(partial(init_weights, n_layer=n_layer, **(residuals | (initializer_cfg or {}))))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The zero states of every layer: {i: (conv_state (B, D, K), ssm_state (B, D, N))}."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(
        self, input_ids, inference_params=None, *, seq_idx=None, cu_seqlens=None, attention_mask=None,
        initial_states=None, return_final_states=False, gradient_checkpointing=False, **mixer_kwargs,
    ):  # fmt: skip
        """(B, L) ids to (B, L, d_model); keywords as :meth:`MambaLMHeadModel.forward` takes them."""
        hidden_states, residual, final = self.embedding(input_ids), None, {}
        if self.layers and "layout" not in mixer_kwargs:
            width = self.layers[0].mixer.d_conv
            mixer_kwargs["layout"] = layout_of(input_ids, width, seq_idx, cu_seqlens, attention_mask)
        if return_final_states:
            mixer_kwargs["return_final_states"] = True
        again = gradient_checkpointing and torch.is_grad_enabled() and inference_params is None
        for i, layer in enumerate(self.layers):
            if initial_states is not None:
                mixer_kwargs["initial_states"] = initial_states[i]
            call = partial(checkpoint, layer, use_reentrant=False) if again else layer
            hidden_states, residual, *states = call(hidden_states, residual, inference_params, **mixer_kwargs)
            if states:
                final[i] = states[0]
        hidden_states = self._norm(hidden_states, residual, room_of(mixer_kwargs.get("backend")))
        return (hidden_states, final) if return_final_states else hidden_states

    def _norm(self, hidden_states, residual, room):
        if self.fused_add_norm:
            return fused_add_norm(self.norm_f, hidden_states, residual, self.residual_in_fp32, False, room)
        residual = hidden_states if residual is None else hidden_states + residual
        return self.norm_f(residual.to(self.norm_f.weight.dtype))


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """The language model of a :class:`MambaConfig`: token ids to logits of the next token.

    initializer_cfg: keywords of :func:`init_weights`. The vocabulary is padded (V). With
    ``dtype=torch.float16`` or bfloat16 every parameter has that type except A_log and D. The same seed on a
    CPU draws the same float32 weights as the published class.
    """

    def __init__(self, config, initializer_cfg=None, device=None, dtype=None):
        super().__init__()
        self.config = config
        at = {"device": device, "dtype": dtype}
        vocab_size = config.padded_vocab_size()
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, vocab_size, config.ssm_cfg,
            config.attn_layer_idx, config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, **at,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **at)
        residuals = {"n_residuals_per_layer": 2 if config.d_intermediate else 1}
        self.apply(partial(init_weights, n_layer=config.n_layer, **(residuals | (initializer_cfg or {}))))
        self.tie_weights()

    def tie_weights(self):
        """lm_head and embedding are one matrix, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The zero states of every layer, as key_value_memory_dict and initial_states hold them."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0, **mixer_kwargs):
        """(B, L) ids to CausalLMOutput(logits (B, L, V)) in the type of the weights.

        Parameters
        ----------
        position_ids : not used: the recurrence knows the order
        inference_params : an :class:`InferenceParams`; its states are changed in place. The caller adds the
            tokens of each call to its seqlen_offset: one more, several, or the next piece of a prompt.
        num_last_tokens : logits of the last n tokens alone, (B, n, V); 0 for all
        seq_idx, cu_seqlens, attention_mask, backend : as :meth:`Mamba.forward` takes them
        initial_states : {layer: (conv_state, ssm_state)}, as :meth:`allocate_inference_cache` makes them
        return_final_states : the output is CausalLMOutputWithStates(logits, final_states), both
            differentiable; final_states can be the next call's initial_states
        gradient_checkpointing : keep the residual stream between layers, and find the rest again in the
            backward: one more forward, and memory for one layer instead of n_layer
        """
        if not mixer_kwargs:
            logits = whole_step(self, input_ids, inference_params)
            if logits is not None:
                return CausalLMOutput(logits)
        found = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        hidden_states, *states = found if mixer_kwargs.get("return_final_states") else (found,)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        logits = self.lm_head(hidden_states)
        return CausalLMOutputWithStates(logits, *states) if states else CausalLMOutput(logits)

    def loss(
        self, input_ids, labels=None, *, ignore_index=-100, seq_idx=None, cu_seqlens=None,
        attention_mask=None, **mixer_kwargs,
    ):  # fmt: skip
        """Mean cross-entropy of predicting each next token of (B, L) ids, without holding the logits.

        Parameters
        ----------
        labels : (B, L), what stands at each place, input_ids by default: the logits of token t are compared
            with labels[:, t + 1]. A place with ignore_index is not predicted.
        seq_idx, cu_seqlens, attention_mask : as :meth:`forward` takes them. The first token of a sequence is
            not predicted; padding neither predicts nor is predicted.
        mixer_kwargs : the other keywords of :meth:`forward` for sequences

        Returns
        -------
        The loss, float32 and differentiable once; with return_final_states=True, (loss, final_states).
        """
        packing = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
        targets = next_tokens(input_ids, labels, layout_of(input_ids, 1, **packing), ignore_index)
        found = self.backbone(input_ids, **packing, **mixer_kwargs)
        hidden_states, *states = found if mixer_kwargs.get("return_final_states") else (found,)
        room = room_of(mixer_kwargs.get("backend"))
        loss = head_loss(self.lm_head, hidden_states, targets, ignore_index, room)
        return (loss, *states) if states else loss

    @classmethod
    def from_pretrained(cls, pretrained_model_name, device=None, dtype=None, revision=None, **kwargs):
        """The model of a folder or of a name on the Hugging Face hub: see :func:`load_pretrained`."""
        return load_pretrained(cls, pretrained_model_name, device, dtype, revision, **kwargs)

    def save_pretrained(self, save_directory, format="published"):
        """Write weights and config: see :func:`mamba_fast.checkpoints.save_pretrained`."""
        save_pretrained(self, save_directory, format)
