"""The Mamba block with any of Δ, B and C constant: what selection is compared with (paper, table 7)."""

from functools import partial

import torch
from torch import nn

from mamba_fast.init import init_weights
from mamba_fast.mixer import Mamba
from mamba_fast.model import MambaLMHeadModel
from mamba_fast.ops.selective_scan import selective_scan_fn
from mamba_fast.sequence import convolve, narrow, project, room_of, wide

ALL = ("delta", "B", "C")


class PartlySelective(Mamba):
    """A Mamba block in which only the parameters named in `selective` depend on the input.

    Δ without selection is softplus(dt_proj.bias), one number a channel; B and C are (D, N) parameters B and
    C, as in S4D: B = 1, C normal. With none the SSM is linear and time-invariant (LTI), with real A. The
    projections of what is constant are left out. For whole sequences from the zero state, without padding.
    Raises ValueError for an unknown name.
    """

    def __init__(self, d_model, selective=ALL, **options):
        super().__init__(d_model, **options)
        if unknown := set(selective) - set(ALL):
            raise ValueError(f"selective: expected names among {ALL}, got {sorted(unknown)}")
        rows = {"delta": self.dt_rank, "B": self.d_state, "C": self.d_state}
        self.rows = {name: rows[name] for name in ALL if name in selective}
        weight = self.x_proj.weight
        at = {"device": weight.device, "dtype": weight.dtype}
        total = sum(self.rows.values())
        self.x_proj = nn.Linear(self.d_inner, total, bias=False, **at) if total else None
        if "delta" not in selective:
            self.dt_proj.weight = None
        shape = (self.d_inner, self.d_state)
        if "B" not in selective:
            self.B = nn.Parameter(torch.ones(shape, device=weight.device))
        if "C" not in selective:
            self.C = nn.Parameter(torch.randn(shape, device=weight.device))

    def forward(self, hidden_states, inference_params=None, *, layout, backend=None):
        """(B, L, d_model) to (B, L, d_model), for a plain :class:`Layout`."""
        x, z = self._widen(hidden_states).chunk(2, dim=1)
        u = convolve(x, self.conv1d, None, layout, room_of(backend))
        delta, B, C = self.parameters_of(u)
        y = selective_scan_fn(
            u, delta, self._A(), B, C, wide(self.D), z=z, delta_bias=wide(self.dt_proj.bias),
            delta_softplus=True, backend=backend,
        )  # fmt: skip
        return narrow(self.out_proj, y)

    def parameters_of(self, u):
        """For u (B, D, L): delta (B, D, L) before bias and softplus; B, C (B, N, L) or constant (D, N)."""
        chosen = {}
        if self.rows:
            found = project(self.x_proj, u).split(list(self.rows.values()), dim=1)
            chosen = dict(zip(self.rows, found, strict=True))
        dt = chosen.get("delta")
        delta = torch.zeros_like(u) if dt is None else project(self.dt_proj.weight, dt)
        return delta, chosen.get("B", getattr(self, "B", None)), chosen.get("C", getattr(self, "C", None))


def partly_selective_model(config, selective, device=None):
    """The language model of a MambaConfig with :class:`PartlySelective` blocks, initialised alike."""
    model = MambaLMHeadModel(config, device=device)
    for i, layer in enumerate(model.backbone.layers):
        options = {k: v for k, v in config.ssm_cfg.items() if k != "layer"}
        layer.mixer = PartlySelective(config.d_model, selective, layer_idx=i, device=device, **options)
        layer.mixer.apply(partial(init_weights, n_layer=config.n_layer))
    return model
