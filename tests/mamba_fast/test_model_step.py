"""A whole model in one launch, against the same step op by op in float64; the kernel is emulated on a CPU."""

import pytest
import torch
from cuda_emulator import EmulatedKernel

from mamba_fast import nvrtc
from mamba_fast.ops.model_step import LayerWeights, Weights, arguments, cuda_step, torch_step
from mamba_ref.checks import bounds, check

SIZES = [  # layers, d_model, d_inner, dt_rank, N, K, vocabulary
    (1, 8, 16, 8, 4, 2, 5), (2, 40, 72, 8, 12, 3, 64),
    (2, 48, 96, 16, 16, 4, 100), (1, 264, 528, 24, 20, 4, 33),
]  # fmt: skip
KINDS = ("conv_state", "ssm_state")


@pytest.fixture
def device(monkeypatch):
    """The GPU if there is one; else every launch is emulated by one block on the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(nvrtc, "Kernel", EmulatedKernel)
    cuda_step._plans.clear()
    return "cpu"


def model_of(sizes, seed=0, conv_bias=True):
    """Weights whose every tensor changes the logits, in float32."""
    layer_count, d_model, d_inner, dt_rank, d_state, width, vocab = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    layers = tuple(
        LayerWeights(
            1 + draw(d_model, scale=0.3), draw(2 * d_inner, d_model, scale=d_model**-0.5),
            draw(d_inner, width, scale=0.5), draw(d_inner) if conv_bias else None,
            draw(dt_rank + 2 * d_state, d_inner, scale=2 * d_inner**-0.5), draw(d_inner, dt_rank, scale=0.3),
            draw(d_inner), draw(d_inner, d_state), draw(d_inner), draw(d_model, d_inner, scale=d_inner**-0.5),
        )
        for _ in range(layer_count)
    )  # fmt: skip
    head = draw(vocab, d_model, scale=d_model**-0.5)
    return Weights(layers, draw(vocab, d_model), 1 + draw(d_model, scale=0.3), head, 1e-5)


def states_of(weights, batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(
            torch.randn(batch, len(x.D), n, generator=generator) for n in (x.conv.shape[1], x.A_log.shape[1])
        )
        for x in weights.layers
    ]


def at(weights, dtype, device="cpu", single=torch.float32):
    """The same numbers in another type; A_log and D in `single`."""
    rows = [
        LayerWeights(*(v if v is None else v.to(device, dtype) for v in x))._replace(
            A_log=x.A_log.to(device, single), D=x.D.to(device, single)
        )
        for x in weights.layers
    ]
    rest = (v.to(device, dtype) for v in weights[1:4])
    return Weights(tuple(rows), *rest, weights.eps)


def outcome(step, weights, tokens, states):
    """Named results of two steps, the second from what the first left."""
    named = {}
    for turn in range(2):
        logits = step(weights, tokens.roll(turn), states)
        named[f"logits {turn}"] = logits
    return named | {
        f"{kind} {i}": v for i, pair in enumerate(states) for kind, v in zip(KINDS, pair, strict=True)
    }


def check_step(sizes, batch, dtype, device, states_type=None, **options):
    weights, states_type = at(model_of(sizes, **options), dtype), states_type or dtype
    tokens = torch.arange(batch) * 7 % sizes[-1]
    first = [tuple(v.to(states_type) for v in pair) for pair in states_of(weights, batch)]
    assert arguments.obstacle(weights, tokens, first) is None

    def run(step, where, weights, types):
        states = [tuple(v.clone().to(where, types) for v in pair) for pair in first]
        return outcome(step, weights, tokens.to(where), states)

    wide = at(weights, torch.float64, single=torch.float64)
    truth = run(torch_step.step, "cpu", wide, torch.float64)
    plain = run(torch_step.step, "cpu", weights, states_type)
    got = run(cuda_step.step, device, at(weights, dtype, device), states_type)
    for name, limit in bounds(plain, truth).items():
        check(f"{name}, {sizes}", got[name], truth[name], limit)


pytestmark = pytest.mark.cuda


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
