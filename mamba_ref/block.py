"""The Mamba block: widen, convolve, choose delta, B and C from the input, scan, gate, narrow.

Paper: section 3.4 and figure 3 for the block, section 3.6 for the initial values. Parameters carry
the published names, so that published weights load without a map.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mamba_ref.causal_conv import causal_conv, causal_conv_step
from mamba_ref.selective_scan import selective_scan

DT_FLOOR = 1e-4  # smallest initial step size


class MambaBlock(nn.Module):
    """One block: y = W_out (selective_scan(SiLU(conv(x))) * SiLU(z)), with x, z = W_in hidden_states.

    d_model: width outside; d_inner = expand * d_model: channels D inside; d_state: N; d_conv: K;
    dt_rank: R, "auto" is ceil(d_model / 16); dt_min, dt_max: the range of the initial step sizes.
    About 3 expand d_model^2 parameters; per token twice as many operations, and 6 D N in the scan.
    """

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2, dt_rank="auto", dt_min=1e-3, dt_max=0.1):
        super().__init__()
        d_inner = expand * d_model
        dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.sizes = [dt_rank, d_state, d_state]  # how x_proj's output splits into dt, B and C
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)  # holds (D, 1, K) and (D,)
        self.x_proj = nn.Linear(d_inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))  # A = -1 .. -N
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self._init_delta(dt_min, dt_max)

    @torch.no_grad()
    def _init_delta(self, dt_min, dt_max):
        """Make softplus(dt_proj.bias) log-uniform on [dt_min, dt_max]: channels start fast and slow."""
        nn.init.uniform_(self.dt_proj.weight, -(self.sizes[0] ** -0.5), self.sizes[0] ** -0.5)
        log_dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(dt_min), math.log(dt_max))
        dt = log_dt.exp().clamp(min=DT_FLOOR)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, hidden_states):
        """(B, L, d_model) to (B, L, d_model)."""
        return self.prefill(hidden_states)[0]

    def prefill(self, hidden_states, conv_state=None, ssm_state=None):
        """The sequence form with its states: returns out (B, L, d_model), conv_state, ssm_state.

        The states are those of :meth:`allocate_state`; zeros when not given. The ones returned go into
        :meth:`step`, or into the next call, so that a long prompt can be read in pieces.
        """
        inputs, conv_state = self._scan_inputs(hidden_states, conv_state)
        y, ssm_state = selective_scan(**inputs, return_last_state=True, initial_state=ssm_state)
        return self.out_proj(y.mT), conv_state, ssm_state

    def scan_inputs(self, hidden_states):
        """Exactly what this block hands to :func:`selective_scan`, by name, for (B, L, d_model).

        u, delta, z (B, D, L); A (D, N); B, C (B, N, L); D, delta_bias (D,); delta_softplus True. delta is
        taken before the bias and the softplus.
        """
        return self._scan_inputs(hidden_states, None)[0]

    def _scan_inputs(self, hidden_states, conv_state):
        x, z = self.in_proj(hidden_states).mT.chunk(2, dim=1)  # (B, D, L) each
        u, conv_state = causal_conv(x, self.conv1d.weight[:, 0], self.conv1d.bias, "silu",
                                    initial_state=conv_state, return_last_state=True)  # fmt: skip
        dt, B, C = self.x_proj(u.mT).mT.split(self.sizes, dim=1)  # (B, R, L), (B, N, L), (B, N, L)
        inputs = dict(u=u, delta=self.dt_proj.weight @ dt, B=B, C=C, z=z, delta_softplus=True)
        return inputs | self._scan_parameters(), conv_state

    def _scan_parameters(self):
        """A, D and delta_bias, in float32 even where the layers are half precision."""
        A_log, D, delta_bias = (_wide(x) for x in (self.A_log, self.D, self.dt_proj.bias))
        return dict(A=-torch.exp(A_log), D=D, delta_bias=delta_bias)

    def step(self, hidden_states, conv_state, ssm_state):
        """The step form: one token (B, 1, d_model), and the states, to (B, 1, d_model) and the new states.

        Nothing here depends on how many tokens came before. The old states are left as they were.
        """
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)  # (B, D) each
        u, conv_state = causal_conv_step(x, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, "silu")
        dt, B, C = self.x_proj(u).split(self.sizes, dim=-1)  # (B, R), (B, N), (B, N)
        delta = F.linear(dt, self.dt_proj.weight)  # (B, D)
        u, delta, B, C, z = (_wide(v) for v in (u, delta, B, C, z))
        p = self._scan_parameters()
        delta = F.softplus(delta + p["delta_bias"])
        A_bar = torch.exp(delta[..., None] * p["A"])  # (B, D, N)
        ssm_state = A_bar * ssm_state + (delta * u)[..., None] * B[:, None]
        y = ((ssm_state * C[:, None]).sum(-1) + p["D"] * u) * F.silu(z)
        return self.out_proj(y.to(x.dtype))[:, None], conv_state, ssm_state

    def allocate_state(self, batch):
        """Zero states: conv_state (B, D, K) in the layers' type and ssm_state (B, D, N) in float32."""
        d_inner, d_state = self.A_log.shape
        conv_state = self.conv1d.weight.new_zeros(batch, d_inner, self.conv1d.weight.shape[-1])
        return conv_state, _wide(self.A_log).new_zeros(batch, d_inner, d_state)


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
