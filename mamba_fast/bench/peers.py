"""The published kernels, where they can be imported."""

import importlib
import sys

from mamba_fast.bench.case import Kernel

# name of the op: what must be importable, and the function
PUBLISHED = {
    "scan": ("selective_scan_cuda", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "inner": ("causal_conv1d_cuda", "mamba_ssm.ops.selective_scan_interface", "mamba_inner_fn"),
    "conv": ("causal_conv1d_cuda", "causal_conv1d", "causal_conv1d_fn"),
    "conv_update": ("causal_conv1d_cuda", "causal_conv1d", "causal_conv1d_update"),
    "update": ("triton", "mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
    "rms_norm": ("triton", "mamba_ssm.ops.triton.layer_norm", "rms_norm_fn"),
    "layer_norm": ("triton", "mamba_ssm.ops.triton.layer_norm", "layer_norm_fn"),
}


def peers(op, device, wanted, adapt=lambda function: function):
    """[the published kernel of `op`], or [] where it is not wanted or cannot be imported (said on stderr).

    adapt(function) gives it the signature of the bench.
    """
    if not wanted or device.type != "cuda":
        return []
    needs, module, function = PUBLISHED[op]
    try:
        importlib.import_module(needs)
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        print(f"published {function}: not timed, {error}", file=sys.stderr)
        return []
    return [Kernel("published", adapt(found), "peer")]
