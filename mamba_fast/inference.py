"""What a model remembers between two calls while it generates."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class InferenceParams:
    """The states of every layer, and how many tokens they have seen; the published fields.

    key_value_memory_dict: layer index -> (conv_state (B, D, K), ssm_state (B, D, N)), filled by the first
    call and changed in place by every call. seqlen_offset: tokens seen so far, moved on by the caller; 0
    starts from the zero state, whatever the dict holds. A call of B rows uses rows batch_size_offset to
    batch_size_offset + B, so that states of a larger batch serve a smaller one.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen, max_batch_size):
        """Ready for the next batch: nothing seen yet, the memory of the states is kept."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
