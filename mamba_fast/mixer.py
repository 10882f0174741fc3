"""The Mamba block: published names and weights, one sequence or many, all at once or token by token.

Paper: section 3.4 and figure 3. Parameters, their initialisation and the arithmetic are the published ones.
"""

import math

import torch
from torch import nn

from mamba_fast.init import init_scan_parameters, mark_scan_parameters
from mamba_fast.layout import layout_of
from mamba_fast.ops.causal_conv1d import causal_conv1d_update
from mamba_fast.ops.mamba_inner import mamba_inner_fn
from mamba_fast.ops.selective_scan import selective_scan_fn
from mamba_fast.ops.selective_state_update import selective_state_update
from mamba_fast.sequence import before_bias, convolve, last_inputs, narrow, project, room_of, wide

ASLEEP = -80.0  # delta of a padded token: Δ is 2e-35 then, exp(ΔA) exactly 1, and the state passes through


class Mamba(nn.Module):
    """y = W_out (selective_scan(SiLU(conv(x))) · SiLU(z)), with x, z = W_in hidden_states (figure 3).

    d_model: width outside; d_inner = expand d_model: channels D inside; d_state: N; d_conv: K, from 2 to 4;
    dt_rank: R, "auto" is ceil(d_model / 16). dt_min, dt_max, dt_init ("random" or "constant"), dt_scale,
    dt_init_floor: see :meth:`init_scan_parameters`. conv_bias, bias: of the convolution, of in_proj and
    out_proj. use_fast_path: one operator for everything behind in_proj where no states are asked for.
    layer_idx: whose states of an :class:`InferenceParams` are its own. A_log and D are float32 whatever
    `dtype` is.

    About 3 expand d_model² parameters; per token twice as many operations, and 6 D N in the scan.
    """

    def __init__(
        self, d_model, d_state=16, d_conv=4, expand=2, dt_rank="auto", dt_min=0.001, dt_max=0.1,
        dt_init="random", dt_scale=1.0, dt_init_floor=1e-4, conv_bias=True, bias=False, use_fast_path=True,
        layer_idx=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if not 2 <= d_conv <= 4:
            raise ValueError(f"d_conv: expected 2, 3 or 4, got {d_conv!r}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init: expected 'random' or 'constant', got {dt_init!r}")
        at = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.init_options = dict(
            dt_min=dt_min, dt_max=dt_max, dt_init=dt_init, dt_scale=dt_scale, dt_init_floor=dt_init_floor
        )
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **at)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, padding=d_conv - 1, groups=self.d_inner, bias=conv_bias, **at
        )
        self.activation, self.act = "silu", nn.SiLU()  # for code that takes a published block apart
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **at)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **at)
        single = {"device": device, "dtype": torch.float32}
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **single))
        self.D = nn.Parameter(torch.empty(self.d_inner, **single))
        self.init_scan_parameters()
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **at)
        self._kept = None  # (what A_log was, A), for steps
        self.register_load_state_dict_post_hook(_mark_again)

    def __setstate__(self, state):
        super().__setstate__(state)
        mark_scan_parameters(self)  # copy.deepcopy makes parameters without marks

    def init_scan_parameters(self):
        """A = -1 .. -N, D = 1, Δ log-uniform on [dt_min, dt_max] (section 3.6), and their marks."""
        init_scan_parameters(self, **self.init_options)

    def forward(
        self, hidden_states, inference_params=None, *, seq_idx=None, cu_seqlens=None, attention_mask=None,
        initial_states=None, return_final_states=False, backend=None, layout=None, sequence_split=None,
    ):  # fmt: skip
        """(B, L, d_model) to (B, L, d_model).

        Parameters
        ----------
        inference_params : keeps the states of this layer and changes them in place; with seqlen_offset > 0
            these tokens follow the ones before: one, or any number of them
        seq_idx : (B, L) integers, several sequences a row: a change of value starts a new one
        cu_seqlens : (S + 1,) integers, on a batch of one: sequence k is tokens cu_seqlens[k] to
            cu_seqlens[k + 1]. All states have S rows then.
        attention_mask : (B, L), 0 for padding on the left or on the right. What stands there reaches no
            other token and no state: a padded row gives what it gives unpadded. (Padding between tokens
            passes the state through, and starts the convolution afresh.)
        initial_states : (conv_state (B, D, K), ssm_state (B, D, N)) before the first token; differentiable
        return_final_states : also return both after the last token, differentiable
        backend : that of the scan, as :func:`selective_scan_fn` takes it
        layout : the :class:`Layout` of these tokens, in place of the first three, from who has it
        sequence_split : a :class:`SequenceSplit`, whose part these tokens are; other processes have the rest

        Returns
        -------
        out, or (out, (conv_state, ssm_state)).

        Raises
        ------
        TypeError, ValueError : name the argument, what came and what is accepted
        """
        if layout is None:
            layout = layout_of(hidden_states, self.d_conv, seq_idx, cu_seqlens, attention_mask)
        if inference_params is not None:
            if initial_states is not None or return_final_states or sequence_split is not None:
                raise ValueError(
                    "inference_params: holds the states; give no initial_states or sequence_split beside it"
                )
            states = self._get_states_from_cache(inference_params, layout.rows)
            seen = inference_params.seqlen_offset > 0
            if seen and layout.plain and hidden_states.shape[1] == 1:
                return self.step(hidden_states, *states, backend=backend)[0]
            return self._advance(hidden_states, layout, states, seen, backend)
        xz = self._widen(hidden_states)
        if sequence_split is not None or not self._is_fused(layout, initial_states, return_final_states):
            states = (None, None) if initial_states is None else initial_states
            wanted = return_final_states, self._A(), backend, sequence_split
            out, states = self._sequence(xz, layout, *states, *wanted)
            return (out, states) if return_final_states else out
        return mamba_inner_fn(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
            self.out_proj.weight, self.out_proj.bias, self._A(), D=wide(self.D),
            delta_bias=wide(self.dt_proj.bias), delta_softplus=True, backend=backend,
        )  # fmt: skip

    def step(self, hidden_states, conv_state, ssm_state, *, backend=None):
        """The next tokens, (B, 1, d_model) or several of them: (out, conv_state, ssm_state).

        The states are changed in place. Not differentiable. One token costs what the last one did: it
        reads the weights and the states once.
        """
        if hidden_states.shape[1] != 1:
            layout = layout_of(hidden_states, self.d_conv)
            out = self._advance(hidden_states, layout, (conv_state, ssm_state), True, backend)
            return out, conv_state, ssm_state
        room = room_of(backend)
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)  # (B, D) each
        u = causal_conv1d_update(
            x.to(conv_state.dtype), conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, "silu",
            backend=room,
        ).to(x.dtype)  # fmt: skip
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = before_bias(self.dt_proj, dt)
        y = selective_state_update(
            ssm_state, u, delta, self._A_for_steps(), B, C, self.D, z=z, dt_bias=self.dt_proj.bias,
            dt_softplus=True, backend=room,
        )  # fmt: skip
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Zero states: conv_state (B, D, K) in conv1d's type, ssm_state (B, D, N) in dt_proj's, or `dtype`.

        max_seqlen plays no part: the states have one size whatever they have seen.
        """
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or weight.dtype)
        weight = self.dt_proj.weight
        return conv_state, weight.new_zeros(
            batch_size, self.d_inner, self.d_state, dtype=dtype or weight.dtype
        )

    def _get_states_from_cache(self, inference_params, batch_size, initialize_states=False):
        """This layer's states of `batch_size` rows: views of the kept ones, or new zeros."""
        if self.layer_idx is None:
            raise ValueError("layer_idx: needed with inference_params, got None")
        store, first = inference_params.key_value_memory_dict, inference_params.batch_size_offset
        if self.layer_idx not in store:
            store[self.layer_idx] = self.allocate_inference_cache(first + batch_size, None)
        states = store[self.layer_idx]
        if states[0].shape[0] < first + batch_size:
            raise ValueError(
                f"inference_params: layer {self.layer_idx} keeps states of {states[0].shape[0]} rows, and "
                f"rows {first} to {first + batch_size} were asked for"
            )
        if states[0].shape[0] != batch_size:
            states = tuple(v[first : first + batch_size] for v in states)
        if initialize_states:
            for v in states:
                v.zero_()
        return states

    def _advance(self, hidden_states, layout, states, seen, backend):
        """The sequence form with states changed in place; from zero unless they have `seen` tokens."""
        before = states if seen else (None, None)
        if seen and torch.is_grad_enabled():  # the backward needs them as they were
            before = tuple(v.clone() for v in states)
        A = self._A_for_steps(renew=True)
        out, after = self._sequence(self._widen(hidden_states), layout, *before, True, A, backend)
        for kept, new in zip(states, after, strict=True):
            kept.copy_(new.detach())
        return out

    def _sequence(self, xz, layout, conv_state, ssm_state, want_states, A, backend, split=None):
        """out (B, L, d_model) of xz (B, 2D, L), and the states after it, or None."""
        x, z = xz.chunk(2, dim=1)
        scan = selective_scan_fn
        if split is not None:
            conv_state, scan = split.inputs_before(x, conv_state, layout, self.d_conv), split.scan
        u = convolve(x, self.conv1d, conv_state, layout, room_of(backend))
        rows = project(self.x_proj, u)  # (B, R + 2N, L)
        dt, B, C = rows.split([self.dt_rank, self.d_state, self.d_state], dim=1)
        delta = before_bias(self.dt_proj, dt)
        if layout.pad is not None and not layout.begins:
            delta = delta.masked_fill(layout.pad, ASLEEP)
        y = scan(
            u, delta, A, B, C, wide(self.D), z=z, delta_bias=wide(self.dt_proj.bias), delta_softplus=True,
            return_last_state=want_states, initial_state=ssm_state, backend=backend,
            **layout.packing_of_scan(want_states or ssm_state is not None),
        )  # fmt: skip
        if not want_states:
            return narrow(self.out_proj, y), None
        y, ssm_state = y
        return narrow(self.out_proj, y), (last_inputs(x, conv_state, layout, self.d_conv), ssm_state)

    def _widen(self, hidden_states):
        """xz (B, 2D, L), time steps side by side: one product for the whole batch, written where it stays."""
        if type(self.in_proj) is not nn.Linear:  # one that a library has put in its place
            return self.in_proj(hidden_states).mT
        batch, seqlen, _ = hidden_states.shape
        weight, bias = self.in_proj.weight, self.in_proj.bias
        tokens = hidden_states.flatten(0, 1).T  # (d_model, B L)
        xz = torch.mm(weight, tokens) if bias is None else torch.addmm(bias[:, None], weight, tokens)
        return xz.view(2 * self.d_inner, batch, seqlen).transpose(0, 1)

    def _is_fused(self, layout, initial_states, return_final_states):
        plain = all(type(v) is nn.Linear for v in (self.x_proj, self.dt_proj, self.out_proj))
        return (
            self.use_fast_path
            and plain
            and layout.plain
            and initial_states is None
            and not return_final_states
        )

    def _A(self):
        return -torch.exp(wide(self.A_log))

    def _A_for_steps(self, renew=False):
        """A, found once and kept in one place, so that a step or a CUDA graph of it only reads it."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.A_log.is_inference():
            return self._A()
        was = (self.A_log.data_ptr(), self.A_log._version, self.A_log.dtype, self.A_log.device)
        kept_for, A = self._kept or (None, None)
        if A is None or kept_for[2:] != was[2:]:
            with torch.inference_mode(False):
                kept_for, A = None, torch.empty_like(wide(self.A_log), requires_grad=False)
        if renew or kept_for != was:  # written at once: another thread may read it for a step of its own
            torch.neg(torch.exp(wide(self.A_log)), out=A)
            self._kept = (was, A)
        return A


def _mark_again(mixer, _):
    """With assign=True what was loaded stands in place of the marked parameters."""
    mark_scan_parameters(mixer)
