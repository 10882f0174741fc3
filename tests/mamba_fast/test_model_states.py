"""Starting from and returning states: differentiable by keyword, in place through InferenceParams."""

import itertools

import pytest
import torch
from model_inputs import check_logits, fast_model, random_states, reference_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_fast import InferenceParams, Mamba
from mamba_ref.checks import bound, check

ROOM = 2.0**-18  # two float32 results of the same sums in another order, two layers and some fifty roundings


def test_a_row_in_two_calls_is_the_row(backend, device):
    reference, ids = reference_model(1), token_ids(2, 2, 7, device)
    model = fast_model(reference, device)
    with torch.no_grad():
        first = model(ids[:, :2], return_final_states=True, backend=backend)
        rest = model(ids[:, 2:], initial_states=first.final_states, backend=backend).logits
    check_logits("two calls", torch.cat([first.logits, rest], 1), reference, [ids])


def test_gradients_pass_through_the_states():
    """Two calls joined by their states have the gradients of one; so have the first states themselves."""
    reference, ids = reference_model(3), token_ids(4, 2, 9)
    weight = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(5))

    def grads(model, cuts):
        states = random_states(model, 2, 6)
        leaves = [v.requires_grad_() for pair in states.values() for v in pair]
        logits = []
        for a, b in itertools.pairwise(cuts):
            out = model(ids[:, a:b], initial_states=states, return_final_states=True)
            logits.append(out.logits)
            states = out.final_states
        loss = (torch.cat(logits, 1) * weight.to(logits[0].dtype)).sum()
        names = [name for name, _ in model.named_parameters()]
        names += [f"layer {i} {n}" for i in states for n in ("conv_state", "ssm_state")]
        found = torch.autograd.grad(loss, [*model.parameters(), *leaves])
        return dict(zip(names, found, strict=True))

    got, plain = grads(fast_model(reference), (0, 2, 3, 9)), grads(fast_model(reference), (0, 9))
    want = grads(fast_model(reference).double(), (0, 9))
    for name, value in want.items():
        assert value.abs().max() > 0, name
        check(name, got[name], value, bound(plain[name], value))


@torch.no_grad()
def test_states_are_changed_where_they_are():
    """What a CUDA graph relies on: prefill, chunk and step write into the tensors of the first call."""
    model, ids = fast_model(reference_model(7)), token_ids(8, 2, 8)
    params = InferenceParams(max_seqlen=8, max_batch_size=2)
    params.key_value_memory_dict = model.allocate_inference_cache(2, 8)
    places = [v.data_ptr() for pair in params.key_value_memory_dict.values() for v in pair]
    before = None
    for start, end in ((0, 5), (5, 7), (7, 8)):
        model(ids[:, start:end], inference_params=params)
        params.seqlen_offset = end
        now = [v.clone() for pair in params.key_value_memory_dict.values() for v in pair]
        assert before is None or not any(torch.equal(a, b) for a, b in zip(now, before, strict=True))
        before = now
    assert [v.data_ptr() for pair in params.key_value_memory_dict.values() for v in pair] == places


@pytest.mark.parametrize("prompt", [1, 4])
@torch.no_grad()
def test_a_new_prompt_forgets_the_old_one(prompt):
    reference, ids = reference_model(9), token_ids(10, 2, 5)
    model, params = fast_model(reference), InferenceParams(max_seqlen=9, max_batch_size=2)
    model(token_ids(11, 2, 9), inference_params=params)
    params.reset(9, 2)
    logits = [model(ids[:, :prompt], inference_params=params).logits]
    params.seqlen_offset = prompt
    logits.append(model(ids[:, prompt:], inference_params=params).logits)
    check_logits("after reset", torch.cat(logits, 1), reference, [ids])


@torch.no_grad()
def test_a_smaller_batch_uses_the_states_of_a_larger_one():
    """Its own rows of them; the others stay as they were."""
    reference, ids = reference_model(12), token_ids(13, 2, 6)
    model, params = fast_model(reference), InferenceParams(max_seqlen=9, max_batch_size=4)
    model(token_ids(14, 4, 3), inference_params=params)
    kept = [v.clone() for pair in params.key_value_memory_dict.values() for v in pair]
    params.reset(9, 2)
    params.batch_size_offset = 1
    logits = []
    for start, end in ((0, 4), (4, 5), (5, 6)):
        logits.append(model(ids[:, start:end], inference_params=params).logits)
        params.seqlen_offset = end
    check_logits("rows 1 and 2", torch.cat(logits, 1), reference, [ids])
    for v, was in zip((v for p in params.key_value_memory_dict.values() for v in p), kept, strict=True):
        assert torch.equal(v[[0, 3]], was[[0, 3]])
    params.batch_size_offset = 3
    with pytest.raises(ValueError, match=r"layer 0 keeps states of 4 rows, and rows 3 to 5 were asked for"):
        model(ids, inference_params=params)


@torch.no_grad()
def test_several_tokens_a_step():
    torch.manual_seed(15)
    mixer = Mamba(d_model=6, d_state=3, d_conv=4)
    x = torch.randn(2, 7, 6)
    states = mixer.allocate_inference_cache(2, 7)
    several = torch.cat([mixer.step(x[:, a:b], *states)[0] for a, b in ((0, 2), (2, 4), (4, 5), (5, 7))], 1)
    again = mixer.allocate_inference_cache(2, 7)
    single = torch.cat([mixer.step(x[:, t : t + 1], *again)[0] for t in range(7)], 1)
    check("out", several, single, ROOM)
    for name, got, want in zip(("conv_state", "ssm_state"), states, again, strict=True):
        check(name, got, want, ROOM)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_states_of_the_cache_have_the_published_shapes_and_types(dtype):
    mixer = Mamba(d_model=6, d_state=3, d_conv=4, dtype=torch.bfloat16)
    conv_state, ssm_state = mixer.allocate_inference_cache(2, 100, dtype=dtype)
    assert (tuple(conv_state.shape), tuple(ssm_state.shape)) == ((2, 12, 4), (2, 12, 3))
    assert {conv_state.dtype, ssm_state.dtype} == {dtype or torch.bfloat16}
    assert not conv_state.any()
    assert not ssm_state.any()


@torch.no_grad()
def test_a_step_under_autocast():
    """The states keep their own type, whatever type the projections work in."""
    reference, ids = reference_model(16), token_ids(17, 2, 6)
    model, params = fast_model(reference), InferenceParams(max_seqlen=9, max_batch_size=2)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(ids).logits
        logits = []
        for start, end in ((0, 3), (3, 5), (5, 6)):
            logits.append(model(ids[:, start:end], inference_params=params).logits)
            params.seqlen_offset = end
    exact = reference(ids)
    assert {v.dtype for pair in params.key_value_memory_dict.values() for v in pair} == {torch.float32}
    check("autocast", torch.cat(logits, 1), exact, bound(want, exact))


@torch.no_grad()
def test_a_step_sees_new_weights():
    """A is kept between steps, and found again when A_log has changed or a prompt begins."""
    model, ids = fast_model(reference_model(18)), token_ids(19, 1, 4)

    def last():
        params = InferenceParams(max_seqlen=9, max_batch_size=1)
        model(ids[:, :3], inference_params=params)
        params.seqlen_offset = 3
        return model(ids[:, 3:], inference_params=params).logits

    last()
    for layer in model.backbone.layers:
        layer.mixer.A_log.data += 0.5  # a change that autograd does not see
    check("changed", last(), model(ids).logits[:, 3:], ROOM)
    params = InferenceParams(max_seqlen=9, max_batch_size=1)
    model(ids[:, :3], inference_params=params)
    params.seqlen_offset = 3
    for layer in model.backbone.layers:
        layer.mixer.A_log.mul_(1.5)
    states = {i: tuple(v.clone() for v in p) for i, p in params.key_value_memory_dict.items()}
    got = model(ids[:, 3:], inference_params=params).logits
    check("changed between steps", got, model(ids[:, 3:], initial_states=states).logits, ROOM)


def test_a_piece_has_gradients():
    """Those of its own tokens, from states that stand still; changing the kept ones breaks no backward."""
    reference, ids = reference_model(22), token_ids(23, 1, 9)
    model, params = fast_model(reference), InferenceParams(max_seqlen=9, max_batch_size=1)
    found = []
    for start, end in ((0, 4), (4, 6), (6, 9)):
        states = {i: tuple(v.clone() for v in p) for i, p in params.key_value_memory_dict.items()}
        logits = model(ids[:, start:end], inference_params=params).logits
        params.seqlen_offset = end
        want = model(ids[:, start:end], initial_states=states or None).logits
        found.append((logits, want))
    for logits, want in found:
        got, plain = (torch.autograd.grad(v.square().sum(), list(model.parameters())) for v in (logits, want))
        for a, b in zip(got, plain, strict=True):
            check("gradient", a, b, ROOM)
    assert not any(v.requires_grad for pair in params.key_value_memory_dict.values() for v in pair)


def test_misuse_is_named():
    model, ids = fast_model(reference_model(20)), token_ids(21, 1, 3)
    params = InferenceParams(max_seqlen=9, max_batch_size=1)
    with pytest.raises(ValueError, match="inference_params: holds the states"):
        model(ids, inference_params=params, return_final_states=True)
    with pytest.raises(ValueError, match="layer_idx: needed with inference_params"):
        Mamba(4)(torch.randn(1, 2, 4), inference_params=params)


@torch.no_grad()
def test_a_prompt_disturbs_no_step_of_another_thread():
    """The kept A is never anything else, not even for a moment, while a prompt finds it again."""
    model, ids = fast_model(reference_model(20)), token_ids(21, 1, 4)
    mixers = [layer.mixer for layer in model.backbone.layers]
    model(ids, inference_params=InferenceParams(max_seqlen=9, max_batch_size=1))
    want, wrong = [mixer._A() for mixer in mixers], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not all(torch.equal(mixer._kept[1], A) for mixer, A in zip(mixers, want, strict=True)):
                wrong.append(func)
            return out

    with Watch():
        model(ids, inference_params=InferenceParams(max_seqlen=9, max_batch_size=1))
    assert wrong == []
