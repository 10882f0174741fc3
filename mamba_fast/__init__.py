"""Mamba-1 at the speed of the machine: fused kernels behind the published names."""

from mamba_fast.block import Block
from mamba_fast.checkpoints import CheckpointError
from mamba_fast.config import MambaConfig
from mamba_fast.inference import InferenceParams
from mamba_fast.init import check_init, param_groups
from mamba_fast.mixer import Mamba
from mamba_fast.model import MambaLMHeadModel, MixerModel
from mamba_fast.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from mamba_fast.ops.linear_cross_entropy import linear_cross_entropy_fn
from mamba_fast.ops.mamba_inner import mamba_inner_fn
from mamba_fast.ops.rms_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_fast.ops.selective_scan import explain_backend, selective_scan_fn
from mamba_fast.ops.selective_scan.backends import available_backends
from mamba_fast.ops.selective_state_update import selective_state_update

__all__ = [
    "Block",
    "CheckpointError",
    "InferenceParams",
    "Mamba",
    "MambaConfig",
    "MambaLMHeadModel",
    "MixerModel",
    "RMSNorm",
    "available_backends",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "check_init",
    "explain_backend",
    "layer_norm_fn",
    "linear_cross_entropy_fn",
    "mamba_inner_fn",
    "param_groups",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_state_update",
]
