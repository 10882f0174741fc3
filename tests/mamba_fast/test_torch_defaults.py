"""torch.set_default_dtype and torch.set_default_device of the caller change no result."""

import pytest
import torch
from model_inputs import fast_model, reference_model, token_ids

from mamba_fast import Mamba, check_init
from mamba_fast.ops.model_step import LayerWeights, Weights, cuda_step

BACKENDS = ["torch", pytest.param("numba", marks=pytest.mark.numba)]


@pytest.fixture(params=[torch.bfloat16, torch.float64, "meta"], ids=str)
def other_defaults(request):
    """A function that sets them: a type, or a device on which nothing here may land."""
    is_device = isinstance(request.param, str)
    dtype = torch.get_default_dtype()
    yield lambda: (torch.set_default_device if is_device else torch.set_default_dtype)(request.param)
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


def outcome(model, ids, mask, edges, backend):
    """Logits in three forms, and every gradient of the loss."""
    loss = model.loss(ids, backend=backend)
    with torch.no_grad():
        logits = [
            model(ids, attention_mask=mask, backend=backend).logits,
            *model(ids[:1], cu_seqlens=edges, return_final_states=True, backend=backend).final_states[0],
        ]
    return [loss, *logits, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model(other_defaults, backend):
    model, ids = fast_model(reference_model(1)), token_ids(2, 2, 9)
    mask, edges = torch.ones(2, 9, dtype=torch.long), torch.tensor([0, 4, 9])
    mask[0, :3] = 0
    want = outcome(model, ids, mask, edges, backend)
    other_defaults()
    for a, b in zip(outcome(model, ids, mask, edges, backend), want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_generation(other_defaults):
    model, ids = fast_model(reference_model(3)), token_ids(4, 2, 3)
    options = dict(top_k=0, top_p=0.9, min_p=0.01, repetition_penalty=1.2, eos_token_id=[5, 7], seed=1)
    want = model.generate(ids, 30, **options)
    other_defaults()
    assert torch.equal(model.generate(ids, 30, **options), want)


def test_initial_values(other_defaults):
    def block():
        torch.manual_seed(5)
        return Mamba(64, device="cpu", dtype=torch.float32)

    want = block().dt_proj.bias
    other_defaults()
    assert torch.equal(block().dt_proj.bias, want)
    assert check_init(block()) == []


@pytest.mark.cuda
def test_memory_of_a_whole_step(other_defaults, monkeypatch):
    """What blocks hand to each other is float32 in the kernel."""
    monkeypatch.setattr(cuda_step, "_plans", {})
    shapes = (8,), (32, 8), (16, 4), (16,), (16, 16), (16, 8), (16,), (16, 4), (16,), (8, 16)
    layer = LayerWeights(*(torch.zeros(shape).half() for shape in shapes))
    layer = layer._replace(A_log=layer.A_log.float(), D=layer.D.float())
    table = torch.zeros(5, 8).half()
    weights = Weights((layer,), table, torch.zeros(8).half(), table, 1e-5)
    states, tokens = [(torch.zeros(1, 16, 4).half(),) * 2], torch.zeros(1, dtype=torch.long)
    other_defaults()
    plan = cuda_step._plan(weights, tokens, states)
    assert [v.dtype for v in plan.scratch[:3]] == 3 * [torch.float32]
    assert {v.device.type for v in plan.scratch} == {"cpu"}
