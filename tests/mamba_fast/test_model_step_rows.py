"""A step of many sequences, six kernels a layer, against the same step op by op in float64."""

from types import SimpleNamespace

import pytest
import torch
from model_step_inputs import at, check_step, model_of, states_of

from mamba_fast import InferenceParams, MambaConfig, MambaLMHeadModel, whole_step
from mamba_fast.ops.model_step import arguments, model_step, triton_step

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16
SIZES = [  # layers, d_model, d_inner, dt_rank, N, K, vocabulary
    (2, 48, 96, 16, 16, 4, 100), (1, 64, 128, 8, 4, 4, 33), (2, 40, 72, 24, 12, 4, 64),
    (1, 264, 528, 40, 20, 4, 33),
]  # fmt: skip


def with_layer(weights, other, **changes):
    """`weights` whose second layer is the first one of `other`, changed."""
    return weights._replace(layers=(weights.layers[0], other.layers[0]._replace(**changes)))


def check_rows(sizes, batch, dtype=HALF, states=None, **options):
    check_step(triton_step.step, arguments.obstacle_to_rows, sizes, batch, dtype, DEVICE, states, **options)


@pytest.mark.parametrize(
    "sizes, batch", [(SIZES[0], 11), (SIZES[1], 33), (SIZES[2], 1), (SIZES[3], 11), (SIZES[3], 70)]
)
def test_logits_and_states(sizes, batch):
    check_rows(sizes, batch)


def test_states_in_float32_and_no_bias_of_the_convolution():
    check_rows(SIZES[1], 17, states=torch.float32, conv_bias=False)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [9, 128])
def test_bfloat16(batch):  # whose products Triton's interpreter gets wrong
    check_rows((2, 256, 512, 16, 16, 4, 1000), batch, torch.bfloat16)


@pytest.mark.gpu
def test_the_same_bits_every_time_and_in_a_graph():
    weights = at(model_of((3, 512, 1024, 32, 16, 4, 1000)), HALF, DEVICE)
    tokens = torch.arange(40, device=DEVICE)
    first = [tuple(v.to(DEVICE, HALF) for v in pair) for pair in states_of(weights, 40)]
    states = [tuple(v.clone() for v in pair) for pair in first]
    kept = [v for pair in states for v in pair]

    def begin_again():
        for v, was in zip(kept, (v for pair in first for v in pair), strict=True):
            v.copy_(was)

    found = []
    for _ in range(5):
        begin_again()
        found.append((model_step(weights, tokens, states).clone(), [v.clone() for v in kept]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model_step(weights, tokens, states)
    for _ in range(20):  # back to back: each kernel begins while the one before it still runs
        graph.replay()
    begin_again()
    graph.replay()
    found.append((logits, kept))
    for logits, after in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert all(map(torch.equal, after, found[0][1]))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w, t, s: (w, t.repeat(129), s), "1 to 128 sequences, and there are 129"),
        (lambda w, t, s: (w._replace(head=w.head.repeat(1, 3500)), t, s), "no faster for 1 x 168000 numbers"),
        (lambda w, t, s: (at(model_of((1, 8, 16, 8, 4, 3, 5)), HALF), t, s), "4 taps, and there are 3"),
        (lambda w, t, s: (at(model_of((1, 8, 16, 8, 68, 4, 5)), HALF), t, s), "up to 64 states"),
        (lambda w, t, s: (at(w, torch.float32), t, s), "not float16 or bfloat16"),
        (lambda w, t, s: (with_layer(w, model_of((1, 48, 96, 16, 24, 4, 5))), t, s), "several sizes"),
        (lambda w, t, s: (with_layer(w, w, conv_bias=None), t, s), "some of them a bias"),
        (lambda w, t, s: (w, t, [s[0], (s[0][0], s[0][1][..., :8])]), "the states have other shapes"),
        (lambda w, t, s: (w, t.repeat(2), s), "the states have other shapes"),
    ],
)
def test_what_they_do_not_take(change, words):
    weights = at(model_of(SIZES[0]), HALF)
    states = [tuple(v.half() for v in pair) for pair in states_of(weights, 1)]
    assert words in arguments.obstacle_to_rows(*change(weights, torch.zeros(1, dtype=torch.int64), states))


@pytest.mark.parametrize("place", ["lm_head", "in_proj", "x_proj", "out_proj"])
def test_a_model_with_other_biases_goes_layer_by_layer(place):
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=8))
    assert whole_step._weights(model) is not None
    owner = model if place == "lm_head" else model.backbone.layers[1].mixer
    linear = getattr(owner, place)
    linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    assert whole_step._weights(model) is None


@pytest.mark.parametrize("change", ["another class", "a subclass", "a hook", "compiled", "nothing"])
def test_the_choice_is_made_for_a_model_whose_forward_is_our_own(change):
    """Others, which need not even have our parts, are asked by a call."""
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=8))
    if change == "another class":
        model = torch.nn.Linear(2, 2)
    if change == "a subclass":
        model.__class__ = type("Mine", (MambaLMHeadModel,), {})
    if change == "a hook":
        model.register_forward_hook(lambda *args: None)
    if change == "compiled":
        model.compile(backend="eager")
    assert whole_step._unchanged(model) == (change == "nothing")
    ids, params = SimpleNamespace(shape=(1, 1), is_cuda=True), InferenceParams(8, 1, seqlen_offset=1)
    if change != "nothing":
        with torch.no_grad():
            assert whole_step.whole_step(model, ids, params, slots=object()) is None


def test_less_shared_memory_takes_fewer_stages():
    tiles = [triton_step._fitting(tile, 99 * 1024) for n in (16, 128) for tile in triton_step.tiles_for(n)]
    assert all(2 * t.k * (t.m + t.n) * t.stages <= 99 * 1024 for t in tiles)
    assert all(triton_step._fitting(t, 227 * 1024) == t for n in (16, 128) for t in triton_step.tiles_for(n))


@pytest.mark.parametrize("columns", [8, 48, 160, 5120])
def test_what_is_asked_for_ahead_lies_in_the_row(columns):
    tiles = triton_step.tiles_for(128)
    for tile in (tiles.widen, tiles.ranks, tiles.narrow):
        ahead, pieces = triton_step._ahead(tile, columns), 32 * tile.warps // tile.n
        assert ahead <= 2 * columns
        assert ahead % (16 * pieces) == 0
