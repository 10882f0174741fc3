"""A model on several processes: a sequence split over them, and copies or shards of its parameters."""

from mamba_fast.distributed.parameters import full_state_dict, init_from_torchrun, shard, wrap_ddp
from mamba_fast.distributed.sequence_split import SequenceSplit

__all__ = ["SequenceSplit", "full_state_dict", "init_from_torchrun", "shard", "wrap_ddp"]
