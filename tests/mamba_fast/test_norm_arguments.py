"""What the norms refuse: the message names the argument, says what came and what is accepted."""

import pytest
import torch
from cases import device_of

from mamba_fast import RMSNorm, layer_norm_fn, rms_norm_fn


def arguments():
    x = torch.randn(3, 5)
    return {"x": x, "weight": x[0] + 1, "bias": x[1], "residual": x + 1}


BAD = [
    (TypeError, "x", [1.0], "got list", "expected a torch.Tensor"),
    (
        TypeError,
        "x",
        torch.ones(3, 5, dtype=torch.int64),
        "got int64",
        "float32, float16, bfloat16 or float64",
    ),
    (ValueError, "x", torch.tensor(1.0), "got ()", "(..., M)"),
    (TypeError, "weight", None, "got NoneType", "expected a torch.Tensor"),
    (ValueError, "weight", torch.ones(3), "got (3,)", "(5)"),
    (ValueError, "bias", torch.ones(5, 1), "got (5, 1)", "(5)"),
    (ValueError, "bias", torch.ones(5, device="meta"), "got meta", "expected device cpu (that of x)"),
    (ValueError, "residual", torch.ones(5), "got (5,)", "(3, 5)"),
    (ValueError, "x1", torch.ones(3, 5), "got a tensor of shape (3, 5)", "expected None"),
    (ValueError, "weight1", torch.ones(5), "got a tensor of shape (5,)", "expected None"),
    (ValueError, "bias1", torch.ones(5), "got a tensor of shape (5,)", "expected None"),
    (ValueError, "rowscale", torch.ones(3), "got a tensor of shape (3,)", "expected None"),
    (ValueError, "dropout_p", 0.1, "got 0.1", "expected 0.0"),
    (ValueError, "return_dropout_mask", True, "got True", "expected False"),
    (ValueError, "backend", "cuda", "got 'cuda'", "None or one of torch, triton"),
]


@pytest.mark.parametrize("function", [rms_norm_fn, layer_norm_fn])
@pytest.mark.parametrize("error, name, value, came, accepted", BAD)
def test_an_error_names_the_argument_what_came_and_what_is_accepted(
    function, error, name, value, came, accepted
):
    with pytest.raises(error) as caught:
        function(**arguments() | {name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    assert came in message, message
    assert accepted in message, message


def test_the_module_refuses_dropout():
    with pytest.raises(ValueError, match=r"^dropout_p: expected 0.0 .* got 0.5"):
        RMSNorm(5, dropout_p=0.5)


@pytest.mark.triton
@pytest.mark.parametrize(
    "width, dtype, reason", [(5, torch.float64, "float64"), (32769, torch.float32, "more than 32768")]
)
def test_triton_refuses_what_it_cannot_compute(width, dtype, reason):
    device = device_of("triton")
    x, weight = torch.ones(3, width, dtype=dtype, device=device), torch.ones(width, device=device)
    with pytest.raises(ValueError, match=f"^backend: 'triton' cannot take this call: .*{reason}"):
        rms_norm_fn(x, weight, None, backend="triton")
