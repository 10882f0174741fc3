"""The causal depthwise convolution in front of the scan, and its step form. See README.md in this folder."""

from mamba_fast.ops.causal_conv1d import registration
from mamba_fast.ops.causal_conv1d.arguments import (
    INTEGERS,
    check_edges,
    check_input,
    check_like,
    check_state,
    check_weight,
    is_silu,
)
from mamba_fast.ops.causal_conv1d.torch_conv import (
    causal_conv_torch,
    final_states_torch,
    varlen_states_torch,
)
from mamba_fast.ops.rooms import choose

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
    final_states_out=None, activation=None, *, backend=None,
):  # fmt: skip
    """y_t = bias + sum_k weight_k x_{t - (W - 1) + k}, then SiLU if asked for (section 3.4, figure 3).

    Parameters
    ----------
    x : (B, D, L), float32, float16, bfloat16 or float64 (torch backend). Time steps side by side in
        memory, or channels ("channel-last"): neither is copied, nor are slices of them.
    weight : (D, W), W from 2 to 4, any float type of at most 32 bits. bias : (D,), weight's type
    seq_idx : (B, L) int32 or int64; a change of value starts a new sequence, which sees nothing before
        it. A negative value is padding: it counts as zeros, y is 0 there, no gradient passes.
    initial_states : (B, D, W - 1) in x's type, the inputs before the first token, oldest first; zeros
        if None. With seq_idx it belongs to the first sequence of a row.
    return_final_states : also return the last W - 1 inputs of the row's last sequence, (B, D, W - 1)
    final_states_out : a tensor that receives and then is the returned final states
    activation : None, "silu" or "swish"
    backend : None (Triton on a GPU, else torch), "torch" or "triton"

    Returns
    -------
    y (B, D, L) in x's type and layout, or (y, final states). Differentiable in x, weight, bias and
    initial_states, also through the final states; the torch backend twice.

    Raises
    ------
    TypeError, ValueError : name the argument, what came and what is accepted

    Notes
    -----
    2 B D L W operations. Triton moves 2 B D L elements forward (x, y) and 3 B D L backward (x, dy, dx).
    Inside, everything is float32 (float64 for float64 x). dweight and dbias are summed in float32 in an
    order that depends on shapes alone: the same bits run after run.
    """
    check_input(x, ("(B, D, L)",))
    check_weight(weight, bias, x)
    silu = is_silu(activation)
    batch, channels, seqlen = x.shape
    if seq_idx is not None:
        check_like("seq_idx", seq_idx, x, (batch, seqlen), INTEGERS)
    states = (batch, channels, weight.shape[1] - 1)
    if initial_states is not None:
        check_like("initial_states", initial_states, x, states, (x.dtype,), "the type of x")
    if final_states_out is not None:
        check_like("final_states_out", final_states_out, x, states, (x.dtype,), "the type of x")
        if not return_final_states:
            raise ValueError("final_states_out: needs return_final_states=True, got False")
    chosen = choose("causal_conv1d_fn", x, (x, weight), backend)
    if chosen == "torch":
        y = causal_conv_torch(x, weight, bias, seq_idx, initial_states, silu)
        final = (
            final_states_torch(x, weight.shape[1], seq_idx, initial_states) if return_final_states else None
        )
    else:
        y, final = registration.conv(x, weight, bias, seq_idx, initial_states, silu, return_final_states)
    if not return_final_states:
        return y
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None,
    pad_slot_id=-1, *, backend=None,
):  # fmt: skip
    """The next tokens of :func:`causal_conv1d_fn`: shift them into conv_state and convolve.

    Parameters
    ----------
    x : (B, D), one token, or (B, D, T), T of them in turn; types as in :func:`causal_conv1d_fn`
    conv_state : (B, D, S) in x's type, S >= W - 1: the last S inputs, oldest first. Changed in place.
    weight, bias, activation, backend : as in :func:`causal_conv1d_fn`
    cache_seqlens : (B,) int32 or int64, tokens seen so far. conv_state is then a circular buffer:
        input number n stands in column n % S, and only the new columns are written.
    conv_state_indices : (B,) int32 or int64: row b of x uses row conv_state_indices[b] of conv_state,
        which may have any number of rows. A negative index, or pad_slot_id, is padding: y is 0 and no
        state changes. No row may be used twice.

    Returns
    -------
    y of x's shape and type; not differentiable.

    Raises
    ------
    TypeError, ValueError : name the argument, what came and what is accepted

    Notes
    -----
    2 B D T W operations. Moves 2 B D T elements of x and y, and B D (W - 1 + T) of conv_state if it is
    circular, else 2 B D S.
    """
    check_input(x, ("(B, D)", "(B, D, T)"))
    check_weight(weight, bias, x)
    check_state(conv_state, conv_state_indices, x, weight.shape[1])
    silu = is_silu(activation)
    for name, value in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if value is not None:
            check_like(name, value, x, (x.shape[0],), INTEGERS)
    chosen = choose("causal_conv1d_update", x, (x, weight), backend)
    y = registration.conv_update(
        x[..., None] if x.dim() == 2 else x, conv_state, weight, bias, silu, cache_seqlens,
        conv_state_indices, pad_slot_id, chosen,
    )  # fmt: skip
    return y[..., 0] if x.dim() == 2 else y


def causal_conv1d_varlen_states(x, cu_seqlens, state_len, *, backend=None):
    """The conv_state of each packed sequence: its last state_len tokens, zeros before a shorter one.

    Parameters
    ----------
    x : (T, D), all tokens side by side; types as in :func:`causal_conv1d_fn`
    cu_seqlens : (B + 1,) int32 or int64; sequence b holds tokens cu_seqlens[b] to cu_seqlens[b + 1]
    state_len : int, at least 1
    backend : as in :func:`causal_conv1d_fn`

    Returns
    -------
    (B, D, state_len) in x's type. Only the torch backend has a gradient.

    Raises
    ------
    TypeError, ValueError : name the argument, what came and what is accepted

    Notes
    -----
    Moves 2 B D state_len elements.
    """
    check_input(x, ("(T, D)",))
    check_edges(cu_seqlens, x)
    if state_len < 1:
        raise ValueError(f"state_len: expected at least 1, got {state_len}")
    if choose("causal_conv1d_varlen_states", x, (x,), backend) == "torch" or len(cu_seqlens) == 1:
        return varlen_states_torch(x, cu_seqlens, state_len)
    return registration.varlen_states(x, cu_seqlens, state_len)
