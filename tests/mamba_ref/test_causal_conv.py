"""The causal convolution: sum over taps, PyTorch's own, and the shift register are one function."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scan_inputs import bound64, changed_at

from mamba_ref.causal_conv import causal_conv, causal_conv_numpy, causal_conv_step
from mamba_ref.checks import bound, check

LENGTHS = [0, 1, 2, 3, 63, 64, 65, 100]


def conv_inputs(seed, batch=2, d_inner=5, seqlen=13, d_conv=4):
    """x, weight, bias and a conv state: float64 tensors whose values float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, d_inner, seqlen), (d_inner, d_conv), (d_inner,), (batch, d_inner, d_conv)
    return [torch.randn(s, generator=generator, dtype=torch.float32).double() for s in shapes]


def library(x, weight, bias, activation):
    """PyTorch's own convolution, padded with K - 1 zeros at both ends; the tail is cut off."""
    y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])[..., : x.shape[2]]
    return F.silu(y) if activation else y


def rounding_count(d_conv):
    return 2 * d_conv + 5  # a product and a sum a tap; bias, and the four operations of SiLU


def test_oracle_gives_the_numbers_worked_out_by_hand():
    # Taps (1, 10, 100), the last for the present token; bias 0.5; the inputs before were (9, 1, 2).
    #   y_1 = 1*1 + 10*2 + 100*3 + 0.5 = 321.5     y_2 = 1*2 + 10*3 + 100*4 + 0.5 = 432.5
    x, weight, past = np.array([[[3.0, 4.0]]]), np.array([[1.0, 10.0, 100.0]]), np.array([[[9.0, 1.0, 2.0]]])
    y, state = causal_conv_numpy(x, weight, np.array([0.5]), initial_state=past, return_last_state=True)
    check("y by hand", y, np.array([[[321.5, 432.5]]]), 0)
    check("conv state by hand", state, np.array([[[2.0, 3.0, 4.0]]]), 0)


@pytest.mark.parametrize("seqlen", LENGTHS[1:])
@pytest.mark.parametrize("d_conv", [1, 2, 3, 4, 7])
def test_oracle_and_torch_are_the_library_convolution(d_conv, seqlen):
    for activation in (None, "silu"):
        x, weight, bias, _ = conv_inputs(1, seqlen=seqlen, d_conv=d_conv)
        want = library(x, weight, bias, activation)
        limit = bound64(
            library(x.float(), weight.float(), bias.float(), activation), want, rounding_count(d_conv)
        )
        check("oracle", causal_conv_numpy(x.numpy(), weight.numpy(), bias.numpy(), activation), want, limit)
        check("torch", causal_conv(x, weight, bias, activation), want, limit)
        without = library(x, weight, None, activation)
        check("no bias", causal_conv_numpy(x.numpy(), weight.numpy(), None, activation), without, limit)
        check("no bias in torch", causal_conv(x, weight, None, activation), without, limit)


@pytest.mark.parametrize("batch, d_inner, d_conv", [(1, 1, 1), (2, 5, 4), (1, 7, 3)])
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_step_form_is_the_sequence_form(batch, d_inner, d_conv, seqlen, activation):
    x, weight, bias, state = conv_inputs(2, batch, d_inner, seqlen, d_conv)
    options = dict(initial_state=state, return_last_state=True)
    want, want_state = causal_conv_numpy(x.numpy(), weight.numpy(), bias.numpy(), activation, **options)
    x, weight, bias, state = (v.float() for v in (x, weight, bias, state))
    plain, plain_state = causal_conv(x, weight, bias, activation, initial_state=state, return_last_state=True)
    ys = []
    for t in range(seqlen):
        y, state = causal_conv_step(x[..., t], state, weight, bias, activation)
        ys.append(y)
    check("steps", torch.stack(ys, -1) if ys else x, want, bound(plain, want))
    check("conv state after steps", state, want_state, 0)
    check("conv state after the sequence", plain_state, want_state, 0)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 12, 13])
def test_a_sequence_may_be_split_anywhere(cut):
    x, weight, bias, state = (v.numpy() for v in conv_inputs(3))
    options = dict(return_last_state=True)
    want, want_state = causal_conv_numpy(x, weight, bias, "silu", initial_state=state, **options)
    head, state = causal_conv_numpy(x[..., :cut], weight, bias, "silu", initial_state=state, **options)
    tail, state = causal_conv_numpy(x[..., cut:], weight, bias, "silu", initial_state=state, **options)
    limit = rounding_count(4) * 2.0**-53
    check("two pieces", np.concatenate([head, tail], -1), want, limit)
    check("conv state of two pieces", state, want_state, 0)


@pytest.mark.parametrize("t", [0, 5, 12])
def test_a_change_is_seen_by_its_own_token_and_the_next_three_only(t):
    x, weight, bias, _ = conv_inputs(4)
    before, after = causal_conv(x, weight, bias, "silu"), causal_conv(changed_at(x, t), weight, bias, "silu")
    moved = (before != after).all(dim=(0, 1))
    assert moved.tolist() == [t <= s < t + 4 for s in range(13)]
    untouched = [s for s in range(13) if not t <= s < t + 4]
    check("outside the four", after[..., untouched], before[..., untouched], 0)


def test_the_oldest_entry_of_the_state_is_out_of_reach():
    x, weight, bias, state = conv_inputs(5)
    changed = state.clone()
    changed[..., 0] += 1
    got, want = (causal_conv(x, weight, bias, initial_state=s) for s in (changed, state))
    check("oldest input", got, want, 0)
    changed[..., 1] += 1
    assert (causal_conv(x, weight, bias, initial_state=changed)[..., 0] != want[..., 0]).all()


def test_a_step_leaves_the_old_state_as_it_was():
    x, weight, bias, state = conv_inputs(6)
    kept = state.clone()
    causal_conv_step(x[..., 0], state, weight, bias)
    check("old conv state", state, kept, 0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_types_are_read_as_float32_and_rounded_once(half):
    x, weight, bias, state = (v.to(half) for v in conv_inputs(7))
    wide = [v.float() for v in (x, weight, bias)]
    y = causal_conv(x, weight, bias, "silu", initial_state=state)
    check("half y", y, causal_conv(*wide, "silu", initial_state=state.float()).to(half), 0)
    y, state = causal_conv_step(x[..., 0], state, weight, bias, "silu")
    assert y.dtype == state.dtype == half


def test_gradients_pass_gradcheck():
    x, weight, bias, state = (v.requires_grad_() for v in conv_inputs(8, 1, 2, 5, 3))

    def conv(x, weight, bias, state):
        return causal_conv(x, weight, bias, "silu", initial_state=state, return_last_state=True)

    def step(x, weight, bias, state):
        return causal_conv_step(x[..., 0], state, weight, bias, "silu")

    assert torch.autograd.gradcheck(conv, (x, weight, bias, state))
    assert torch.autograd.gradcheck(step, (x, weight, bias, state))


def test_no_sequences_give_an_empty_result():
    x, weight, bias, state = conv_inputs(9, batch=0)
    assert causal_conv(x, weight, bias, "silu", initial_state=state).shape == (0, 5, 13)
    assert causal_conv_numpy(x.numpy(), weight.numpy(), bias.numpy()).shape == (0, 5, 13)


def test_errors_name_the_argument():
    x, weight, bias, state = conv_inputs(10)
    for function in (causal_conv, causal_conv_numpy):
        with pytest.raises(ValueError, match=r"weight: got shape \(5, 1, 4\)"):
            function(x, weight[:, None], bias)
        with pytest.raises(ValueError, match=r"weight: got shape \(4, 4\).* D = 5"):
            function(x, weight[1:], bias)
        with pytest.raises(ValueError, match="activation: got 'relu'"):
            function(x, weight, bias, "relu")
        with pytest.raises(ValueError, match=r"conv state: got shape \(2, 5, 3\)"):
            function(x, weight, bias, initial_state=state[..., 1:])
    with pytest.raises(ValueError, match=r"conv state: got shape \(2, 5, 3\)"):
        causal_conv_step(x[..., 0], state[..., 1:], weight, bias)
