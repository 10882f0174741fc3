"""The sizes of a language model, under the published names."""

from dataclasses import dataclass, field


@dataclass
class MambaConfig:
    """Everything that decides the shapes and the arithmetic of :class:`MambaLMHeadModel`.

    d_model: width of the residual stream. n_layer: blocks. vocab_size: tokens, padded up to a multiple of
    pad_vocab_size_multiple. ssm_cfg: keyword arguments of :class:`Mamba`, and "layer", which must be
    "Mamba1". d_intermediate: width of a gated MLP behind each mixer, 0 for none. rms_norm: RMSNorm, else
    LayerNorm. residual_in_fp32: the stream is float32 whatever the type of the layers. fused_add_norm: the
    sum in front of a norm is part of it. tie_embeddings: lm_head and embedding are one matrix.
    attn_layer_idx, attn_cfg: attention layers, of which there must be none.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: list = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def padded_vocab_size(self):
        """Rows of the embedding: vocab_size up to the next multiple of pad_vocab_size_multiple."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple
