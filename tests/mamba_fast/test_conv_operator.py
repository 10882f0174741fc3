"""The causal convolution as an operator: registration, torch.compile, and what its functions refuse."""

import functools

import pytest
import torch
from cases import device_of
from conv_inputs import conv_inputs, outcome

from mamba_fast import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from mamba_ref.checks import errors

CUDA = torch.cuda.is_available()


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    return request.param


@pytest.mark.triton
@pytest.mark.parametrize("packed", [False, True])
def test_the_operators_are_registered_properly(packed):
    from mamba_fast.ops.causal_conv1d import registration

    device = "cuda" if CUDA else "cpu"
    tensors = [v.float().to(device) for v in conv_inputs(14, 2, 3, 9).values()]
    x, weight, bias, state = tensors
    seq_idx = torch.tensor([[0] * 4 + [1] * 5] * 2, device=device) if packed else None
    leaves = [v.clone().requires_grad_() for v in tensors]
    torch.library.opcheck(registration.conv, (*leaves[:3], seq_idx, leaves[3], True, packed))
    dfinal = torch.ones_like(state) if packed else None
    torch.library.opcheck(registration.conv_backward, (x, dfinal, x, weight, bias, seq_idx, None, True))
    table = torch.zeros(2, 3, 4, device=device)
    count = torch.tensor([3, 5], device=device) if packed else None
    for backend in ("torch", "triton"):
        args = (
            x[..., :2],
            table,
            weight,
            None,
            True,
            count,
            torch.tensor([1, -1], device=device),
            -1,
            backend,
        )
        torch.library.opcheck(registration.conv_update, args)
    torch.library.opcheck(registration.varlen_states, (x[0], torch.tensor([0, 1, 3], device=device), 4))


def test_compiled_code_has_no_break(backend, device):
    inputs = {k: v.float().to(device) for k, v in conv_inputs(15, 2, 3, 9).items()}
    table, cu_seqlens = torch.zeros(2, 3, 4, device=device), torch.tensor([0, 2], device=device)

    def model(x, weight, bias, initial_states, table):
        y, final = causal_conv1d_fn(
            2 * x, weight, bias, None, initial_states, True, None, "silu", backend=backend
        )
        with torch.no_grad():
            step = causal_conv1d_update(x[..., 0] + 1, table, weight, backend=backend)
            states = causal_conv1d_varlen_states(x[..., 0], cu_seqlens, 4, backend=backend)
        return y.sin() + step[..., None] + states.sum(), final

    tables, found = (table.clone(), table.clone()), []
    for run, state in zip(
        (model, torch.compile(model, fullgraph=True, backend="aot_eager")), tables, strict=True
    ):
        found.append(outcome(functools.partial(run, table=state), inputs))
    assert torch.equal(*tables)
    assert tables[0].any()
    for name, want in found[0].items():
        assert errors(found[1][name], want)[1] <= 1e-6, name


def test_a_step_says_that_it_has_no_gradient(backend, device):
    x = torch.randn(2, 3, device=device, requires_grad=True)
    y = causal_conv1d_update(
        x, torch.zeros(2, 3, 4, device=device), torch.ones(3, 4, device=device), backend=backend
    )
    with pytest.raises(NotImplementedError, match="causal_conv1d_update has no gradient"):
        y.sum().backward()


FUNCTIONS = {"fn": causal_conv1d_fn, "update": causal_conv1d_update, "states": causal_conv1d_varlen_states}


def arguments(function):
    x = torch.ones(2, 6, 5)
    if function == "states":
        return {"x": x[0], "cu_seqlens": torch.tensor([0, 2]), "state_len": 3}
    name, width = ("conv_state", 4) if function == "update" else ("initial_states", 3)
    return {"x": x, "weight": torch.ones(6, 4), "bias": torch.ones(6), name: torch.ones(2, 6, width)}


def integers(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_arguments_themselves_are_accepted(function):
    assert FUNCTIONS[function](**arguments(function)).isfinite().all()


@pytest.mark.parametrize("function, name, value, error, came, accepted", [
    ("fn", "x", [1.0], TypeError, "got list", "expected a torch.Tensor"),
    ("fn", "weight", None, TypeError, "got NoneType", "expected a torch.Tensor"),
    ("fn", "seq_idx", 3, TypeError, "got int", "expected a torch.Tensor"),
    ("update", "conv_state", None, TypeError, "got NoneType", "expected a torch.Tensor"),
    ("states", "cu_seqlens", [0, 2], TypeError, "got list", "expected a torch.Tensor"),
    ("fn", "x", torch.ones(6, 5), ValueError, "got (6, 5)", "(B, D, L)"),
    ("update", "x", torch.ones(5), ValueError, "got (5,)", "(B, D) or (B, D, T)"),
    ("states", "x", torch.ones(1, 6, 5), ValueError, "got (1, 6, 5)", "(T, D)"),
    ("fn", "weight", torch.ones(6, 5), ValueError, "got (6, 5)", "(6, W) with W from 2 to 4"),
    ("fn", "weight", torch.ones(6, 1), ValueError, "got (6, 1)", "(6, W) with W from 2 to 4"),
    ("update", "weight", torch.ones(6, 1, 4), ValueError, "got (6, 1, 4)", "(6, W) with W from 2 to 4"),
    ("fn", "bias", torch.ones(5), ValueError, "got (5,)", "(6,)"),
    ("fn", "seq_idx", integers(2, 4), ValueError, "got (2, 4)", "(2, 5)"),
    ("fn", "initial_states", torch.ones(2, 6, 4), ValueError, "got (2, 6, 4)", "(2, 6, 3)"),
    ("update", "conv_state", torch.ones(2, 6, 2), ValueError, "got (2, 6, 2)", "(2, 6, S) with S >= W - 1"),
    ("update", "conv_state", torch.ones(3, 6, 4), ValueError, "got (3, 6, 4)", "(2, 6, S)"),
    ("update", "cache_seqlens", integers(3), ValueError, "got (3,)", "(2,)"),
    ("update", "conv_state_indices", integers(2, 1), ValueError, "got (2, 1)", "(2,)"),
    ("states", "cu_seqlens", integers(0), ValueError, "got (0,)", "(B + 1,)"),
    ("states", "state_len", 0, ValueError, "got 0", "at least 1"),
    ("fn", "x", torch.ones(2, 6, 5, dtype=torch.int32), TypeError, "got int32", "float32, float16, bfloat16"),
    ("fn", "weight", torch.ones(6, 4).double(), TypeError, "got float64", "float32 or float16 or bfloat16"),
    ("fn", "bias", torch.ones(6).half(), TypeError, "got float16", "expected float32 (the type of weight)"),
    ("fn", "initial_states", torch.ones(2, 6, 3).half(), TypeError, "got float16", "expected float32"),
    ("fn", "seq_idx", integers(2, 5, dtype=torch.int16), TypeError, "got int16", "int32 or int64"),
    ("update", "conv_state", torch.ones(2, 6, 4).half(), TypeError, "got float16", "expected float32"),
    ("fn", "activation", "relu", ValueError, "got 'relu'", "None, 'silu' or 'swish'"),
    ("update", "activation", True, ValueError, "got True", "None, 'silu' or 'swish'"),
    ("fn", "backend", "numba", ValueError, "got 'numba'", "None or one of torch, triton"),
    ("fn", "final_states_out", torch.ones(2, 6, 3), ValueError, "got False", "return_final_states=True"),
    ("fn", "weight", torch.ones(6, 4, device="meta"), ValueError, "got meta", "device cpu (that of x)"),
    ("update", "cache_seqlens", integers(2).to("meta"), ValueError, "got meta", "device cpu (that of x)"),
])  # fmt: skip
def test_what_is_refused(function, name, value, error, came, accepted):
    """The message begins with the argument's name, says what came and what is accepted."""
    with pytest.raises(error) as caught:
        FUNCTIONS[function](**arguments(function) | {name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    assert came in message, message
    assert accepted in message, message


@pytest.mark.triton
def test_triton_asked_to_take_float64():
    given = {k: v.to(device_of("triton"), torch.float64) for k, v in arguments("fn").items()}
    with pytest.raises(ValueError, match=r"^backend: 'triton' cannot take this call: .* float64"):
        causal_conv1d_fn(**given, backend="triton")
