"""Gradients of the model, activation checkpointing, and torch.compile without a break in the graph."""

import pytest
import torch
from model_inputs import fast_model, random_states, reference_model, token_ids

from mamba_fast import InferenceParams
from mamba_ref.checks import bound, check

FORMS = ("plain", "mask", "seq_idx", "cu_seqlens", "states", "autocast")


def keywords(form, model):
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2]])
    return {
        "mask": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0]])},
        "seq_idx": {"seq_idx": seq_idx},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 3, 8, 9])},
        "states": {"initial_states": random_states(model, 1, 1), "return_final_states": True},
    }.get(form, {})


def outcome(call, model, ids, **options):
    """Logits and every gradient of a sum of them."""
    logits = call(ids, **options).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return [logits, *torch.autograd.grad((logits * weight.to(logits)).sum(), list(model.parameters()))]


def test_gradients_are_those_of_the_reference(backend, device):
    reference, ids = reference_model(3), token_ids(4, 2, 9, device)
    model = fast_model(reference, device)
    got = outcome(lambda ids: model(ids, backend=backend), model, ids)

    def of_reference(model):
        class Output:
            logits = model(ids.cpu())

        return outcome(lambda ids: Output, model, ids.cpu())

    want, plain = of_reference(reference), of_reference(reference_model(3).float())
    names = ["logits", *(name for name, _ in reference.named_parameters())]
    assert names[1:] == [name for name, _ in model.named_parameters()]
    floor = bound(torch.cat([p.flatten() for p in plain]), torch.cat([w.flatten() for w in want]))
    for name, a, b, c in zip(names, got, plain, want, strict=True):
        assert a.abs().max() > 0, name
        check(name, a, c, max(bound(b, c), floor))  # luck of plain PyTorch with one tensor is not asked for


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_nothing(form):
    model, ids = fast_model(reference_model(5)), token_ids(6, 1, 9)
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        options = keywords(form, model)
        kept = outcome(model, model, ids, **options)
        again = outcome(model, model, ids, gradient_checkpointing=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_gradient_checkpointing_keeps_the_stream_alone():
    model, ids = fast_model(reference_model(7)), token_ids(8, 2, 40)

    def kept(**options):
        saved = {}

        def pack(v):
            saved[v.untyped_storage().data_ptr()] = v.numel()
            return v

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            model(ids, backend="torch", **options)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(n for place, n in saved.items() if place not in own)

    tokens, streams = ids.numel(), len(model.backbone.layers) + 1
    assert kept(gradient_checkpointing=True) <= tokens * (
        2 * streams * 10 + 32 + 64
    )  # streams; logits; norms
    assert kept() > 5 * kept(gradient_checkpointing=True)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_break(form):
    """torch.compile(fullgraph=True) refuses any; logits and gradients are those of the eager call."""
    model, ids = fast_model(reference_model(9)), token_ids(10, 1, 9)

    def call(ids, **options):
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            return model(ids, **options)

    torch._dynamo.reset()
    options = keywords(form, model)
    eager = outcome(call, model, ids, **options)
    compiled = outcome(torch.compile(call, fullgraph=True, backend="aot_eager"), model, ids, **options)
    for a, b in zip(compiled, eager, strict=True):
        check(form, a, b, bound(b, b))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does it
@pytest.mark.parametrize(
    "form, backend", [("plain", None), ("mask", None), ("states", None), ("plain", "torch")]
)
def test_a_compiled_model_takes_batches_of_other_sizes(form, backend):
    """The last batch has fewer rows, the next text another length: torch.compile leaves both open then."""
    model = fast_model(reference_model(9))

    def call(ids, **options):
        return model(ids, backend=backend, **options).logits

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for batch, seqlen in ((2, 9), (3, 12)):
        ids, mask = token_ids(10, batch, seqlen), torch.ones(batch, seqlen, dtype=torch.long)
        mask[0, :2] = mask[1, -1] = 0
        states = {"initial_states": random_states(model, batch, 1), "return_final_states": True}
        options = {"mask": {"attention_mask": mask}, "states": states}.get(form, {})
        want = call(ids, **options)
        check(f"{form}, {batch} x {seqlen}", compiled(ids, **options), want, bound(want, want))


@torch.no_grad()
def test_a_step_compiles_without_a_break():
    model, ids = fast_model(reference_model(11)), token_ids(12, 2, 8)
    both = [InferenceParams(max_seqlen=8, max_batch_size=2) for _ in range(2)]
    for params in both:
        model(ids[:, :5], inference_params=params)

    def step(ids, params):
        return model(ids, inference_params=params, num_last_tokens=1).logits

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for t in range(5, 8):
        for params in both:
            params.seqlen_offset = t
        got, want = compiled(ids[:, t : t + 1], both[0]), step(ids[:, t : t + 1], both[1])
        check(f"token {t}", got, want, bound(want, want))


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_in_a_cuda_graph():
    """Captured once, replayed for every token: the logits are those of the sequence form."""
    reference, ids = reference_model(13), token_ids(14, 2, 10, "cuda")
    model = fast_model(reference, "cuda")
    params = InferenceParams(max_seqlen=10, max_batch_size=2)
    params.key_value_memory_dict = model.allocate_inference_cache(2, 10)
    token = ids[:, :1].clone()

    def step():
        return model(token, inference_params=params, num_last_tokens=1).logits

    params.seqlen_offset = 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    params.reset(10, 2)
    model(ids[:, :4], inference_params=params)
    found = []
    for t in range(4, 10):
        token.copy_(ids[:, t : t + 1])
        graph.replay()
        found.append(logits.clone())
    exact, plain = reference(ids.cpu())[:, 4:], reference_model(13).float()(ids.cpu())[:, 4:]
    check("replayed", torch.cat(found, 1), exact, bound(plain, exact))
