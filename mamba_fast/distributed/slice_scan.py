"""The selective scan of one slice of each row, whose other slices other processes hold."""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from mamba_fast.ops.selective_scan.registration import _room
from mamba_fast.ops.selective_scan.slices import chain, summary
from mamba_fast.ops.selective_scan.torch_scan import selective_scan_torch


class SliceScan(torch.autograd.Function):
    """(y, last_state) of this rank's slice, from the state behind all slices before it.

    The inputs are those of :class:`Arguments` up to seq, then the backend and a :class:`SequenceSplit`.
    Forward: what the slice hands on (a summary, not a scan), one exchange, one scan from the state that
    arrives. Backward: the same against the tokens, with flows in place of states; no rank waits for another
    one's scan. As state and flow are the true ones, no gradient has a share elsewhere.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, seq, backend, split):
        local, total = summary(split.in_last_sequence(u), delta, A, B, None, delta_bias, False, backend)
        if initial_state is not None and split.rank == 0:
            local = local + split.through(A, total, initial_state)
        everyone = gather(torch.cat([local, total[..., None]], -1), split.group)  # (P, B, D, N + 1)
        totals = everyone[..., -1].contiguous()  # kept for the backward, the rest is not
        h = chain(A, split.before(everyone[..., :-1]), split.before(totals), split.arrives_left)
        if initial_state is not None and split.rank == 0:
            h = h + initial_state
        args = u, delta, A, B, C, D, z, delta_bias, h, seq, True, False, len(u)
        y, last_state, states = _forward(backend, args)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, seq, h, states, totals)
        ctx.backend, ctx.split, ctx.started = backend, split, initial_state is not None
        ctx.set_materialize_grads(False)
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        u, delta, A, B, C, D, z, delta_bias, seq, h, states, totals = ctx.saved_tensors
        split = ctx.split
        dy = torch.zeros_like(u) if dy is None else dy
        local = summary(split.in_first_sequence(dy), delta, A, C, z, delta_bias, True, ctx.backend)[0]
        if dlast is not None:
            local = local + split.through(A, totals[split.rank], dlast)
        everyone = gather(local, split.group)  # (P, B, D, N)
        flow = chain(A, split.after(everyone), split.after(totals), split.arrives_right)
        if dlast is not None:
            flow = flow + dlast
        args = u, delta, A, B, C, D, z, delta_bias, h, seq, True, False, len(u)
        *grads, dh = _backward(ctx.backend, args, states, dy, flow)
        dinitial = dh * (split.rank == 0) if ctx.started else None
        return *grads, dinitial, None, None, None


def gather(own, group):
    """Everybody's tensor, (P, ...)."""
    everyone = own.new_empty(dist.get_world_size(group), *own.shape)
    dist.all_gather(list(everyone.unbind()), own.contiguous(), group=group)
    return everyone


def _forward(backend, args):
    """y, last_state and what the backward keeps."""
    if backend == "torch":
        return *selective_scan_torch(*args), None
    return _room(backend).forward(*args, True)


def _backward(backend, args, states, dy, dlast):
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, None where absent."""
    if backend != "torch":
        *tensors, initial_state, seq, softplus, varlen, rows = args
        ordered = torch.are_deterministic_algorithms_enabled()
        return _room(backend).backward(
            dy, dlast, *tensors, seq, softplus, varlen, rows, states, initial_state, ordered
        )
    with torch.enable_grad():  # once more, as the torch backend keeps every state
        leaves = [None if v is None else v.detach().requires_grad_() for v in args[:9]]
        outputs = selective_scan_torch(*leaves, *args[9:])
        found = iter(torch.autograd.grad(outputs, [v for v in leaves if v is not None], [dy, dlast]))
    return [None if v is None else next(found) for v in leaves]
