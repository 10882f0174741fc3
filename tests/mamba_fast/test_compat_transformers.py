"""transformers' Mamba takes its fast path on our functions: the logits and gradients of its slow one."""

import importlib.util
import inspect
import sys
import time

import pytest
import torch
from compat_speed import fresh, imported_models
from model_inputs import BLOCK, D_MODEL, N_LAYER, VOCAB, reference_model, token_ids

import mamba_fast
from mamba_fast import compat
from mamba_ref import MambaLM
from mamba_ref.checks import bound, bounds, check

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
PACKAGES = ("mamba_ssm", "causal_conv1d")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in PACKAGES), reason="the published packages are installed"
)
OURS = {  # by the name in their module
    "mamba_inner_fn": mamba_fast.mamba_inner_fn,
    "mamba_selective_scan": mamba_fast.selective_scan_fn,
    "mamba_selective_state_update": mamba_fast.selective_state_update,
    "causal_conv1d_fn": mamba_fast.causal_conv1d_fn,
    "causal_conv1d_update": mamba_fast.causal_conv1d_update,
}


@pytest.fixture(scope="module")
def modules():
    """Their module with our functions, and without."""
    aside = imported_models()
    with compat.register():
        fast = fresh("on_ours")
    slow = fresh("alone")
    yield fast, slow
    sys.modules.update(aside)
    del sys.modules[fast.__name__], sys.modules[slow.__name__]


def implementation(module, name):
    """What transformers has frozen under this name."""
    return inspect.getclosurevars(getattr(module, name)).nonlocals["implementation"]


def theirs(module, reference, device="cpu", **sizes):
    """Their model with the weights of the reference."""
    sizes = sizes or dict(
        hidden_size=D_MODEL, num_hidden_layers=N_LAYER, state_size=BLOCK["d_state"],
        conv_kernel=BLOCK["d_conv"],
    )  # fmt: skip
    vocab = reference.backbone.embedding.weight.shape[0]
    config = module.MambaConfig(vocab_size=vocab, tie_word_embeddings=True, pad_token_id=1, **sizes)
    model = module.MambaForCausalLM(config)
    weights = {renamed(k): v.float() for k, v in reference.state_dict().items()}
    model.load_state_dict(weights)
    return model.to(device)


def renamed(key):
    return key.replace("embedding.", "embeddings.")


def loss_and_gradients(model, ids):
    """The logits, and by name the gradients of their cross-entropy with the next token."""
    model.zero_grad()
    logits = model(ids)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {renamed(k): p.grad.clone() for k, p in model.named_parameters()}


def check_both(fast, slow, reference, ids):
    """`fast` against the reference in float64; the bounds come from `slow`, their own path."""
    want, want_grads = loss_and_gradients(reference, ids)
    plain, plain_grads = loss_and_gradients(slow, ids)
    got, got_grads = loss_and_gradients(fast, ids)
    check("logits", got, want, bound(plain, want))
    limits = bounds(plain_grads, want_grads)
    assert set(limits) == set(got_grads) == set(want_grads)
    for name, limit in limits.items():
        check(name, got_grads[name], want_grads[name], limit)


@pytest.mark.parametrize("name, ours", OURS.items())
def test_every_function_is_ours(modules, name, ours):
    fast, slow = (implementation(module, name) for module in modules)
    assert fast is ours
    assert slow.__module__ == modules[1].__name__


@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients(modules, training):
    """In training the fused block function is called, else convolution and scan in turn."""
    reference, ids = reference_model(1), token_ids(2, 2, 37)
    models = [theirs(module, reference).train(training) for module in modules]
    check_both(*models, reference, ids)


def test_padded_rows(modules):
    reference, ids = reference_model(3), token_ids(4, 1, 7)
    padded = torch.cat([torch.full((1, 3), 5), ids], 1)
    mask = (torch.arange(10) >= 3).long()[None]
    fast, slow = (theirs(module, reference).eval() for module in modules)
    with torch.no_grad():
        want = reference(ids)
        got, plain = (model(padded, attention_mask=mask).logits[:, 3:] for model in (fast, slow))
    check("padded", got, want, bound(plain, want))


def test_greedy_text_step_by_step(modules):
    reference, ids = reference_model(5), token_ids(6, 2, 4)
    fast = theirs(modules[0], reference).eval()
    want = reference.greedy(ids, 10)
    padded = list(range(VOCAB, fast.config.vocab_size))  # rows of the vocabulary that are no tokens
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, suppress_tokens=padded)
    text = fast.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert text.tolist() == want.tolist()


def test_a_model_imported_too_early_is_named(monkeypatch, modules):
    fast, _ = modules
    monkeypatch.setitem(sys.modules, "transformers.models.mamba.modeling_mamba", fast)
    with pytest.warns(UserWarning, match=r"imported before register.*models\.mamba\.modeling_mamba"):
        compat.register()
    compat.unregister()


def test_its_questions_for_the_packages_are_asked_again(monkeypatch):
    """With a GPU their answer is yes while we are registered; Mamba-2, which we have not, stays no."""
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)
    asked = ("is_mamba_ssm_available", "is_causal_conv1d_available", "is_mamba_2_ssm_available")

    def answers():
        return [getattr(import_utils, name)() for name in asked]

    compat._forget_what_was_available()
    try:
        assert answers() == [False, False, False]
        with compat.register():
            assert answers() == [True, True, False]
        assert answers() == [False, False, False]
    finally:
        compat._forget_what_was_available()


def step_time(model, ids, steps=3):
    """Seconds of one forward and backward, the best of some."""
    best = float("inf")
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss_and_gradients(model, ids)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_on_a_gpu(modules, training, capsys):
    """A model of width 256: equal, and faster than their slow path."""
    torch.manual_seed(7)
    reference = MambaLM(256, 4, VOCAB).double().cuda()
    ids = token_ids(8, 2, 257, "cuda")
    sizes = dict(hidden_size=256, num_hidden_layers=4)
    fast, slow = (theirs(module, reference, "cuda", **sizes).train(training) for module in modules)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check_both(fast, slow, reference, ids)
        times = [step_time(model, ids) for model in (fast, slow)]
    with capsys.disabled():
        print(
            f"\ntransformers, training={training}: {times[1] / times[0]:.1f} times as fast on our functions"
        )
    assert times[0] < times[1]
