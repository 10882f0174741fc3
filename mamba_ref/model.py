"""The Mamba language model: an embedding, n_layer blocks on a residual stream, a norm, a tied head.

The state_dict has the published keys, so that published weights load by ``load_state_dict``.
"""

import torch
from torch import nn

from mamba_ref.block import MambaBlock
from mamba_ref.rms_norm import RMSNorm


class _Layer(nn.Module):
    """Norm and mixer; the residual sum in front of the norm is :func:`mamba_ref.rms_norm.add_rms_norm`."""

    def __init__(self, d_model, block):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = MambaBlock(d_model, **block)


class MambaLM(nn.Module):
    """Token ids to next-token logits. The vocabulary is padded to a multiple of 8 (V).

    `block` holds keyword arguments of :class:`MambaBlock`. ``MambaLM(768, 24, 50277)`` has the sizes of
    the published 130m model. Logits (B, L, V) are in the type of the weights.
    """

    def __init__(self, d_model, n_layer, vocab_size, **block):
        super().__init__()
        self.vocab_size = vocab_size
        padded = -(-vocab_size // 8) * 8
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(padded, d_model)
        self.backbone.layers = nn.ModuleList(_Layer(d_model, block) for _ in range(n_layer))
        self.backbone.norm_f = RMSNorm(d_model)
        self.lm_head = nn.Linear(d_model, padded, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for layer in self.backbone.layers:  # n_layer outputs add up on the stream: keep its size
            layer.mixer.out_proj.weight.data /= n_layer**0.5

    def forward(self, input_ids):
        """(B, L) token ids to (B, L, V) logits."""
        return self.prefill(input_ids)[0]

    def prefill(self, input_ids, states=None):
        """The sequence form with its states: (B, L) ids to (B, L, V) logits and one state pair a layer."""
        states = [(None, None)] * len(self.backbone.layers) if states is None else states
        return self._run(self.backbone.embedding(input_ids), states, MambaBlock.prefill)

    def step(self, token, states):
        """The step form: one id a row (B,), and the states, to (B, V) logits and the new states."""
        logits, states = self._run(self.backbone.embedding(token)[:, None], states, MambaBlock.step)
        return logits[:, 0], states

    def _run(self, x, states, mix):
        residual, new_states = None, []
        for layer, (conv_state, ssm_state) in zip(self.backbone.layers, states, strict=True):
            x, residual = layer.norm(x, residual)
            x, conv_state, ssm_state = mix(layer.mixer, x, conv_state, ssm_state)
            new_states.append((conv_state, ssm_state))
        x, _ = self.backbone.norm_f(x, residual)
        return self.lm_head(x), new_states

    def allocate_state(self, batch):
        """Zero states of every layer: [(conv_state (B, D, K), ssm_state (B, D, N)), ...]."""
        return [layer.mixer.allocate_state(batch) for layer in self.backbone.layers]

    @torch.no_grad()
    def greedy(self, input_ids, n):
        """Append the likeliest token n times, padding ids apart: (B, L) ids, L >= 1, to (B, L + n)."""
        logits, states = self.prefill(input_ids)
        logits, out = logits[:, -1], [input_ids]
        for _ in range(n):
            token = logits[:, : self.vocab_size].argmax(-1)  # (B,)
            out.append(token[:, None])
            logits, states = self.step(token, states)
        return torch.cat(out, dim=1)
