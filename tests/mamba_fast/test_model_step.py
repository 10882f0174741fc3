"""A whole model in one launch, against the same step op by op in float64; the kernel is emulated on a CPU."""

import pytest
import torch
from cuda_emulator import EmulatedKernel
from model_step_inputs import at, model_of, states_of
from model_step_inputs import check_step as check_any_step

from mamba_fast import nvrtc
from mamba_fast.ops.model_step import arguments, cuda_step
from mamba_fast.ops.next_token import Slots, greedy_token

SIZES = [  # layers, d_model, d_inner, dt_rank, N, K, vocabulary
    (1, 8, 16, 8, 4, 2, 5), (2, 40, 72, 8, 12, 3, 64),
    (2, 48, 96, 16, 16, 4, 100), (1, 264, 528, 24, 20, 4, 33),
]  # fmt: skip


@pytest.fixture
def device(monkeypatch):
    """The GPU if there is one; else every launch is emulated by one block on the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(nvrtc, "Kernel", EmulatedKernel)
    cuda_step._plans.clear()
    return "cpu"


pytestmark = pytest.mark.cuda


def check_step(sizes, batch, dtype, device, states=None, **options):
    check_any_step(cuda_step.step, arguments.obstacle, sizes, batch, dtype, device, states, **options)


@pytest.mark.parametrize("sizes, dtype", [(SIZES[0], torch.float16), (SIZES[1], torch.bfloat16)])
def test_one_sequence(sizes, dtype, device):
    check_step(sizes, 1, dtype, device)


@pytest.mark.parametrize("sizes, batch", [(SIZES[2], 3), (SIZES[3], 8)])
def test_several_sequences(sizes, batch, device):
    check_step(sizes, batch, torch.bfloat16, device)


def test_states_in_float32_and_no_bias_of_the_convolution(device):
    check_step(SIZES[1], 2, torch.float16, device, torch.float32, conv_bias=False)


def test_a_ring_that_goes_round_many_times(device, monkeypatch):
    monkeypatch.setattr(cuda_step, "MOST_PIECE", 600)
    monkeypatch.setattr(cuda_step, "ring_for", lambda macros, limit: 8)
    check_step(SIZES[2], 2, torch.float16, device)


@pytest.mark.parametrize("columns", [None, 60, 1])
@pytest.mark.parametrize("eos", [(), (3,), (5, 40, 2)])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_likeliest_token_is_recorded(batch, eos, columns, device):
    """As greedy_token does it, from the logits that come back; every logit comes several times."""
    weights = at(model_of(SIZES[2]), torch.bfloat16, device)
    weights = weights._replace(head=weights.head[torch.arange(100) % 15].contiguous())
    states = [tuple(v.to(device).bfloat16() for v in pair) for pair in states_of(weights, batch)]
    whole = {"dtype": torch.long, "device": device}
    slots = Slots(
        torch.arange(batch, device=device)[:, None] * 7, torch.zeros(5, batch, **whole),
        torch.full((batch,), 1, **whole), torch.tensor(eos, **whole),
        (torch.arange(batch, device=device) % 3 == 1) & bool(eos),
    )  # fmt: skip
    want = Slots(*(v if v is None else v.clone() for v in slots))
    for turn in range(3):
        tokens = want.token[:, 0].clone()
        again = [tuple(v.clone() for v in pair) for pair in states]
        plain = cuda_step.step(weights, tokens, again)
        logits = cuda_step.step(weights, slots.token[:, 0], states, slots, columns)
        assert torch.equal(logits, plain), turn
        assert all(
            torch.equal(a, b) for x, y in zip(states, again, strict=True) for a, b in zip(x, y, strict=True)
        )
        greedy_token(logits[:, :columns], want, backend="torch")
        assert all(torch.equal(a, b) for a, b in zip(slots[:5], want[:5], strict=True)), turn


def test_what_is_no_number_is_not_chosen(device):
    weights = at(model_of(SIZES[0]), torch.float16, device)
    weights.head[2] = float("nan")
    weights.head[1], weights.head[4] = 0, -0.0
    states = [tuple(v.to(device).half() for v in pair) for pair in states_of(weights, 1)]
    zero = torch.zeros(1, dtype=torch.long, device=device)
    slots = Slots(zero[:, None].clone(), zero[None].clone(), zero.clone(), zero[:0], zero[:1].bool())
    logits = cuda_step.step(weights, slots.token[:, 0], states, slots)[0].tolist()
    best = max(v for v in logits if v == v)
    assert slots.token.item() == slots.tokens.item() == logits.index(best)
    weights.head[:] = float("nan")
    cuda_step.step(weights, zero, states, slots._replace(tokens=zero.repeat(2)[:, None]))
    assert slots.token.item() == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w, t, s: (w, t.repeat(9), s), "1 to 8 sequences, and there are 9"),
        (lambda w, t, s: (at(w, torch.float32), t, s), "not float16 or bfloat16"),
        (lambda w, t, s: (w._replace(head=w.head.float()), t, s), "not float16"),
        (lambda w, t, s: (w._replace(norm_f=w.norm_f.float()), t, s), "several types"),
        (lambda w, t, s: (w, t, [(a.double(), b) for a, b in s]), "the states have the types"),
        (lambda w, t, s: (w._replace(layers=()), t, s), "no layer"),
        (lambda w, t, s: (w, t.int(), s), "not int64"),
        (lambda w, t, s: (at(model_of((1, 8, 16, 3, 4, 2, 5)), torch.float16), t, s), "multiples of 8"),
        (lambda w, t, s: (w._replace(head=w.head.T.contiguous().T), t, s), "not contiguous"),
    ],
)
def test_what_it_does_not_take(change, words):
    weights = at(model_of(SIZES[0]), torch.float16)
    states = [tuple(v.half() for v in pair) for pair in states_of(weights, 1)]
    assert words in arguments.obstacle(*change(weights, torch.zeros(1, dtype=torch.int64), states))
