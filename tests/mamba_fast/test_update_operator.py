"""The update as an operator: no gradient is lost silently, it compiles, and errors say what is wrong."""

from types import SimpleNamespace

import pytest
import torch
from cases import device_of
from step_inputs import at_types, step_inputs

from mamba_fast import selective_state_update
from mamba_fast.ops import rooms
from mamba_fast.ops.selective_state_update.registration import update
from mamba_fast.ops.selective_state_update.torch_update import step

ORDER = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def room(request):
    return request.param


@pytest.fixture
def device(room):
    return "cuda" if room == "triton" and torch.cuda.is_available() else "cpu"


def test_a_gradient_is_refused_and_not_lost(room, device):
    inputs = step_inputs(2, 0, 5, 3, seed=16, device=device)
    with torch.inference_mode():
        want = selective_state_update(**inputs | {"state": inputs["state"].clone()}, backend=room)
    version = inputs["state"]._version
    inputs["A"] = inputs["A"].clone().requires_grad_()
    y = selective_state_update(**inputs, backend=room)
    assert torch.equal(y, want)
    assert not inputs["state"].requires_grad
    assert inputs["state"]._version > version
    with pytest.raises(RuntimeError, match="selective_state_update"):
        y.sum().backward()


def test_autograd_sees_that_the_state_changes(room, device):
    inputs = step_inputs(2, 0, 5, 3, seed=17, device=device)
    factor = torch.ones_like(inputs["state"], requires_grad=True)
    product = factor * inputs["state"]  # its backward needs the state as it is now
    selective_state_update(**inputs, backend=room)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("heads", [0, 2])
def test_gradcheck_of_the_step_in_pytorch(heads):
    inputs = step_inputs(2, heads, 3, 2, seed=18)
    leaves = [inputs[name].double().requires_grad_() for name in ORDER]
    assert torch.autograd.gradcheck(lambda *given: step(*given, True), leaves)
    assert torch.autograd.gradgradcheck(lambda *given: step(*given, True), leaves)


@pytest.mark.parametrize("indices", [None, torch.tensor([1, -1])])
def test_the_operator_is_registered_properly(room, device, indices):
    inputs = at_types(step_inputs(2, 2, 3, 4, seed=19, device=device), torch.bfloat16, torch.bfloat16)
    indices = None if indices is None else indices.to(device)
    torch.library.opcheck(update, (*(inputs[name] for name in ORDER), True, indices, room))


def test_a_model_around_it_compiles_without_a_break(room, device):
    inputs = step_inputs(2, 2, 3, 4, seed=20, device=device)

    def model(**k):
        return selective_state_update(**k | {"x": k["x"] * 2}, backend=room) + k["state"].sum()

    state = inputs["state"].clone()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    assert torch.equal(got, model(**inputs | {"state": state}))
    assert torch.equal(inputs["state"], state)


BAD = [
    (TypeError, "state", [1.0], "got list", "expected a torch.Tensor"),
    (TypeError, "x", None, "got NoneType", "expected a torch.Tensor"),
    (ValueError, "state", torch.ones(2, 3), "got (2, 3)", "(B, P, N) or (B, H, P, N)"),
    (TypeError, "state", torch.ones(2, 3, 5, 4, dtype=torch.int32), "got int32", "float32, float16"),
    (ValueError, "state", torch.ones(3, 3, 5, 4), "got 3", "expected 2 rows"),
    (ValueError, "x", torch.ones(2, 5), "got (2, 5)", "(B, 3, 5)"),
    (ValueError, "dt", torch.ones(2, 3, 1), "got (2, 3, 1)", "(2, 3, 5)"),
    (ValueError, "A", torch.ones(3, 5), "got (3, 5)", "(3, 5, 4)"),
    (TypeError, "A", torch.ones(3, 5, 4, dtype=torch.complex64), "got complex64", "float32"),
    (ValueError, "B", torch.ones(2, 3), "got (2, 3)", "(2, 4) or (2, G, 4)"),
    (ValueError, "B", torch.ones(2, 2, 4), "got G = 2", "must divide H = 3"),
    (ValueError, "C", torch.ones(2, 0, 4), "got G = 0", "must divide H = 3"),
    (ValueError, "D", torch.ones(5), "got (5,)", "(3, 5)"),
    (ValueError, "z", torch.ones(2, 15), "got (2, 15)", "(2, 3, 5)"),
    (ValueError, "z", torch.ones(2, 3, 5, device="meta"), "got meta", "expected device cpu (that of state)"),
    (ValueError, "dt_bias", torch.ones(3, 1), "got (3, 1)", "(3, 5)"),
    (TypeError, "state_batch_indices", torch.ones(2), "got float32", "int32 or int64"),
    (ValueError, "state_batch_indices", torch.zeros(3, dtype=torch.int64), "got (3,)", "(2)"),
    (ValueError, "state_batch_indices", torch.tensor([0, 2]), "got 2", "expected values below 2"),
    (ValueError, "backend", "cuda", "got 'cuda'", "None or one of torch, triton"),
]  # fmt: skip


@pytest.mark.parametrize("error, name, value, came, accepted", BAD)
def test_an_error_names_the_argument_what_came_and_what_is_accepted(error, name, value, came, accepted):
    inputs = step_inputs(2, 3, 5, 4)
    before = inputs["state"].clone()
    with pytest.raises(error) as caught:
        selective_state_update(**inputs | {name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    assert came in message, message
    assert accepted in message, message
    assert torch.equal(inputs["state"], before)


@pytest.mark.triton
def test_triton_asked_to_take_float64():
    inputs = step_inputs(2, 0, 5, 4, device=device_of("triton"))
    with pytest.raises(ValueError, match=r"^backend: 'triton' cannot take this call: .* float64"):
        selective_state_update(**inputs | {"D": inputs["D"].double()}, backend="triton")


def test_a_gpu_without_triton_warns_once_and_names_the_extra(monkeypatch):
    monkeypatch.setattr(rooms, "_TRITON", False)
    monkeypatch.setattr(rooms, "_warned", set())
    on_gpu = SimpleNamespace(is_cuda=True, numel=lambda: 1, dtype=torch.float32, device="cuda:0")
    with pytest.warns(UserWarning, match=r"one_op runs on the torch backend.*mamba-fast\[triton\]") as caught:
        assert [rooms.choose("one_op", on_gpu, (on_gpu,), None) for _ in range(3)] == ["torch"] * 3
    assert len(caught) == 1
    with pytest.raises(
        ValueError, match=r"^backend: 'triton' cannot take this call: triton is not installed"
    ):
        rooms.choose("one_op", on_gpu, (on_gpu,), "triton")


@pytest.mark.triton
def test_triton_without_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r"^backend: 'triton' cannot take this call: it needs a GPU .* on cpu"
    ):
        selective_state_update(**step_inputs(2, 0, 5, 4), backend="triton")
