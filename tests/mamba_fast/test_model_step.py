"""A whole model in one launch, against the same step op by op in float64; the kernel is emulated on a CPU."""

import pytest
import torch
from cuda_emulator import EmulatedKernel
from model_step_inputs import at, model_of, states_of
from model_step_inputs import check_step as check_any_step

from mamba_fast import nvrtc
from mamba_fast.ops.model_step import arguments, cuda_step

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
