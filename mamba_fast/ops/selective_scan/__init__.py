"""The selective scan: one function, several backends. See README.md in this folder."""

import torch

from mamba_fast.ops.selective_scan import backends
from mamba_fast.ops.selective_scan.arguments import normalise
from mamba_fast.ops.selective_scan.registration import fused_scan
from mamba_fast.ops.selective_scan.torch_scan import selective_scan_torch

__all__ = ["explain_backend", "selective_scan_fn"]


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
    return_last_state=False, *, initial_state=None, seq_idx=None, cu_seqlens=None, deterministic=None,
    backend=None,
):  # fmt: skip
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = C_t h_t + D u_t, then y SiLU(z) (Algorithm 2, lines 3-6).

    Parameters
    ----------
    u, delta, z : (B, D, L), float32, float16, bfloat16 or float64 (torch backend), one type
    A : (D, N) float32, or complex64 (torch backend; then y = 2 Re(C h))
    B, C : (B, N, L) or (B, G, N, L) in u's type, or constant (D, N) in A's type. Group g serves
        channels d with d // (D / G) == g. Complex A: last axis 2L, interleaved re, im pairs.
    D, delta_bias : (D,) float32
    delta_softplus : Δ = softplus(delta + delta_bias), the identity above 20
    return_last_state : also return the state after the last token, (B, D, N) float32
    initial_state : (B, D, N), the state before the first token; zero if None
    seq_idx : (B, L) integers; a change of value starts a new sequence from the zero state.
        initial_state belongs to the first sequence of a row, last_state to its last one.
    cu_seqlens : (S + 1,) integers on a batch of one; sequence k holds tokens cu_seqlens[k] to
        cu_seqlens[k + 1]. initial_state and last_state are (S, D, N). An empty sequence keeps its
        state. Values are checked when the tensor lives on the CPU.
    deterministic : gradients have the same bits in every run; None: only where
        ``torch.use_deterministic_algorithms`` asks for it. The GPU backends then add up what dB and dC
        get from the channels in a fixed order, in more memory.
    backend : None (see :func:`explain_backend`), "torch", "numba", "triton" or "cuda"

    Returns
    -------
    y (B, D, L) in u's type, or (y, last_state). Both are differentiable in every float argument,
    initial_state included; the torch backend twice. Empty input gives empty y and the initial state.

    Raises
    ------
    TypeError, ValueError : name the argument, what came and what is accepted

    Notes
    -----
    About 6 B D L N operations and one exp each; fused backends move (4 B D L + 2 B N L) elements
    forward and keep the state at chunk boundaries only. Inside, everything is float32 (float64 for
    float64 input); y is rounded once.
    """
    args = normalise(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, cu_seqlens)
    if torch.compiler.is_compiling():
        states = int(A.shape[1]) if A.dim() == 2 else None
        empty = not u.numel()  # a bool; == 0 is none where torch.compile leaves a size open
        kind = (u.device, u.dtype, A.is_complex(), states, empty)
        name = backends.name_for_compiler(*kind, backend)
    else:
        choice = backends.choose(u, A, backend)
        backends.warn_once_if_missing(choice)
        name = choice.name
    if name == "torch" or u.numel() == 0:  # plain PyTorch knows every empty shape
        y, last_state = selective_scan_torch(*args)
    else:
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in args if isinstance(t, torch.Tensor))
        y, last_state = fused_scan(args, bool(deterministic), keep, name)
    return (y, last_state) if return_last_state else y


def explain_backend(u, delta=None, A=None, *args, backend=None, **kwargs):
    """Which backend `selective_scan_fn` takes for these arguments, why, and why not the others.

    Takes the arguments of :func:`selective_scan_fn` (only u, A and backend matter). Returns a
    :class:`BackendChoice` that prints as text. Raises ValueError where `backend` cannot take the call.
    """
    if not isinstance(u, torch.Tensor):
        raise TypeError(f"u: expected a torch.Tensor, got {type(u).__name__}")
    A = torch.empty(0, dtype=torch.float32) if A is None else A
    return backends.choose(u, A, backend)
