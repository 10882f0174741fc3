"""Initial values, which of them must survive a training framework, and how to see whether they did.

Paper: section 3.6 (A and Δ), appendix E.2 (weight decay); the rest as in the published code.
"""

import math

import torch
from torch import nn

from mamba_fast.init_check import check_init

__all__ = ["check_init", "init_scan_parameters", "init_weights", "mark_scan_parameters", "param_groups"]


@torch.no_grad()
def init_scan_parameters(mixer, dt_min, dt_max, dt_init, dt_scale, dt_init_floor):
    """A = -1 .. -N in each channel, D = 1, softplus(dt_proj.bias) log-uniform on [dt_min, dt_max].

    dt_proj.weight is uniform within ± R^-½ dt_scale, which keeps the variance; or that number everywhere
    if dt_init is "constant". Draws dt_proj.weight, then dt_proj.bias.
    """
    weight, bias = mixer.dt_proj.weight, mixer.dt_proj.bias
    limit = weight.shape[1] ** -0.5 * dt_scale
    if dt_init == "constant":
        nn.init.constant_(weight, limit)
    else:
        nn.init.uniform_(weight, -limit, limit)
    span = math.log(dt_max) - math.log(dt_min)
    dt = torch.exp(torch.rand(len(bias), dtype=torch.float32, device=bias.device) * span + math.log(dt_min))
    dt = dt.clamp(min=dt_init_floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    states = mixer.A_log.shape[1]
    mixer.A_log.copy_(torch.log(torch.arange(1, states + 1, dtype=torch.float32, device=bias.device)))
    mixer.D.fill_(1.0)
    mark_scan_parameters(mixer)


def mark_scan_parameters(mixer):
    """The published marks: no weight decay for A_log and D, no second initialisation for dt_proj.bias."""
    mixer.A_log._no_weight_decay = True
    mixer.D._no_weight_decay = True
    mixer.dt_proj.bias._no_reinit = True


def init_weights(
    module, n_layer, initializer_range=0.02, rescale_prenorm_residual=True, n_residuals_per_layer=1
):
    """The published initialisation of a module's own parameters, for ``model.apply``.

    Embedding: normal with standard deviation initializer_range. Biases of Linear: zero, except where
    marked `_no_reinit`. What is added to the stream, out_proj and fc2: PyTorch's default over
    sqrt(n_residuals_per_layer n_layer), so that the stream does not grow with depth.
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if not rescale_prenorm_residual:
        return
    for name in ("out_proj", "fc2"):
        layer = module._modules.get(name)
        if layer is not None:
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            with torch.no_grad():
                layer.weight /= math.sqrt(n_residuals_per_layer * n_layer)


def param_groups(model, weight_decay):
    """Two groups for an optimizer: what decays with `weight_decay`, and what does not.

    A_log, D and every parameter marked `_no_weight_decay` do not decay: shrinking A_log slows every
    channel down. Neither do vectors: norms, biases, and so the bias of Δ. Frozen parameters are left out,
    a shared one counts once.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        marked = getattr(parameter, "_no_weight_decay", False) or name.split(".")[-1] in ("A_log", "D")
        (kept if marked or parameter.dim() < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
