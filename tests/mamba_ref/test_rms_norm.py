"""RMSNorm against hand-worked numbers and PyTorch's own; the residual sum that stays in float32."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scan_inputs import bound64

from mamba_ref.checks import bound, check
from mamba_ref.rms_norm import EPS, RMSNorm, add_rms_norm, rms_norm, rms_norm_numpy


def norm_inputs(seed, *shape):
    """x, weight and a residual: float64 tensors whose values float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float32).double() for s in (shape, shape[-1:], shape)
    ]


def test_oracle_gives_the_numbers_worked_out_by_hand():
    # x = (3, 4): the mean of 9 and 16 is 12.5; with eps = 3.5 the root is 4, so y = (3/4 * 2, 4/4 * 10).
    y = rms_norm_numpy(np.array([3.0, 4.0]), np.array([2.0, 10.0]), eps=3.5)
    check("y by hand", y, np.array([1.5, 10.0]), 0)


def test_the_published_eps():
    assert EPS == 1e-5
    x, weight, _ = norm_inputs(1, 3, 5)
    check("default eps", rms_norm(x, weight), rms_norm(x, weight, 1e-5), 0)


@pytest.mark.parametrize("shape", [(1,), (2, 7), (3, 65, 100), (1, 1, 63), (0, 5)])
def test_oracle_and_torch_are_the_library_norm(shape):
    x, weight, _ = norm_inputs(2, *shape)
    x = x / 100  # so that eps counts
    want = F.rms_norm(x, shape[-1:], weight, EPS)
    plain = F.rms_norm(x.float(), shape[-1:], weight.float(), EPS)
    limit = bound64(plain, want, shape[-1] + 5)  # M squares summed; root, quotient, weight
    check("oracle", rms_norm_numpy(x.numpy(), weight.numpy()), want, limit)
    check("torch", rms_norm(x, weight), want, limit)
    check("torch in float32", rms_norm(x.float(), weight.float()), want, bound(plain, want))


def test_half_types_are_normalised_in_float32():
    x, weight, _ = norm_inputs(3, 4, 7)
    x, weight = (1000 * x).half(), weight.half()  # squares would overflow float16
    assert rms_norm(x, weight).dtype == torch.float16
    check("half y", rms_norm(x, weight), rms_norm(x.float(), weight.float()).half(), 0)


def test_a_row_of_zeros_stays_zero():
    check("zeros", rms_norm(torch.zeros(2, 5), torch.ones(5)), torch.zeros(2, 5), 0)


def test_the_scale_of_a_row_disappears():
    x, weight, _ = norm_inputs(4, 3, 7)
    check("64 x", rms_norm(64 * x, weight, 0.0), rms_norm(x, weight, 0.0), 0)  # a power of two: exact


def test_add_comes_before_norm_and_the_sum_is_returned():
    x, weight, residual = norm_inputs(5, 2, 3, 7)
    y, new_residual = add_rms_norm(x, residual, weight)
    check("residual", new_residual, x + residual, 0)
    check("norm of the sum", y, rms_norm(x + residual, weight), 0)
    y, first = add_rms_norm(x, None, weight)
    check("first residual", first, x, 0)
    check("norm of the input", y, rms_norm(x, weight), 0)


def test_the_residual_is_float32_beside_half_layers():
    # 1 + 2^-12 is no bfloat16 number: 64 such steps are lost in a half-precision residual.
    step, weight = torch.full((1, 8), 2.0**-12, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    y, residual = add_rms_norm(torch.ones(1, 8, dtype=torch.bfloat16), None, weight)
    for _ in range(64):
        y, residual = add_rms_norm(step, residual, weight)
    assert y.dtype == torch.bfloat16
    assert residual.dtype == torch.float32
    check("a sum of small steps", residual, torch.full((1, 8), 1 + 2.0**-6), 0)


def test_module_starts_at_one_and_is_the_function():
    x, _, residual = norm_inputs(6, 2, 3, 7)
    norm = RMSNorm(7).double()
    check("weight", norm.weight, torch.ones(7), 0)
    for got, want in zip(norm(x, residual), add_rms_norm(x, residual, torch.ones(7)), strict=True):
        check("module", got, want, 0)


def test_gradients_pass_gradcheck():
    x, weight, residual = (v.requires_grad_() for v in norm_inputs(7, 2, 5))
    assert torch.autograd.gradcheck(add_rms_norm, (x, residual, weight))


def test_errors_name_the_argument():
    for function in (rms_norm, rms_norm_numpy):
        with pytest.raises(ValueError, match=r"weight: got shape \(4,\); accepted: \(5,\)"):
            function(torch.ones(2, 5), torch.ones(4))
