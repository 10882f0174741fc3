"""Mamba-1 at the speed of the machine: fused kernels behind the published names."""

from mamba_fast.ops.selective_scan import explain_backend, selective_scan_fn
from mamba_fast.ops.selective_scan.backends import available_backends

__all__ = ["available_backends", "explain_backend", "selective_scan_fn"]
