"""Mamba-1 at the speed of the machine: fused kernels behind the published names."""

from mamba_fast.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from mamba_fast.ops.mamba_inner import mamba_inner_fn
from mamba_fast.ops.rms_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_fast.ops.selective_scan import explain_backend, selective_scan_fn
from mamba_fast.ops.selective_scan.backends import available_backends
from mamba_fast.ops.selective_state_update import selective_state_update

__all__ = [
    "RMSNorm",
    "available_backends",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "explain_backend",
    "layer_norm_fn",
    "mamba_inner_fn",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_state_update",
]
