"""The head and its loss on both rooms against float64, through every option; what is refused and how."""

import pytest
import torch
from loss_inputs import check_loss, inputs_of, outcome, plain

from mamba_fast import linear_cross_entropy_fn
from mamba_fast.ops.linear_cross_entropy import chunks
from mamba_fast.ops.linear_cross_entropy.registration import linear_cross_entropy
from mamba_ref.checks import errors

FLOAT, HALF = torch.float32, torch.bfloat16
REDUCTIONS = ("mean", "sum", "none")
SHAPES = [((), 3, 2), ((1,), 1, 1), ((5,), 9, 1), ((2, 7), 5, 33), ((3, 1, 5), 33, 65), ((40,), 2, 130)]


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def room(request):
    return request.param


@pytest.fixture
def device(room):
    return "cuda" if room == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def small_chunks(monkeypatch):
    """A few rows a chunk, the last one shorter."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("leading, width, columns", SHAPES, ids=str)
def test_every_size(room, device, leading, width, columns, reduction, small_chunks):
    ignored = 0.3 if len(leading) and max(leading) > 1 else 0
    inputs = inputs_of(leading, width, columns, 1, ignored=ignored, device=device)
    check_loss(inputs, room, reduction=reduction)


@pytest.mark.parametrize(
    "vocab_size, bias", [(None, True), (None, False), (33, True), (20, False), (1, True)]
)
@pytest.mark.parametrize("dtype", [FLOAT, HALF, torch.float16])
def test_every_option(room, device, dtype, vocab_size, bias, small_chunks):
    inputs = inputs_of((2, 11), 9, 33, 2, dtype, bias, device=device)
    if vocab_size:
        inputs["labels"] = torch.where(inputs["labels"] < 0, -100, inputs["labels"] % vocab_size)
    check_loss(inputs, room, vocab_size=vocab_size)


@pytest.mark.triton
@pytest.mark.parametrize("vocab_size", [None, 48, 17, 5])
def test_triton_reads_a_row_block_by_block(monkeypatch, vocab_size):
    from mamba_fast.ops.linear_cross_entropy import triton_rows

    monkeypatch.setattr(triton_rows, "_BLOCK", 16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = inputs_of((6,), 5, 50, 21, ignored=0, device=device)
    inputs["labels"] %= vocab_size or 50
    check_loss(inputs, "triton", vocab_size=vocab_size)


@pytest.mark.parametrize("ignore_index", [0, 5, -1, 10**6])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_any_ignore_index_and_type_of_label(room, device, ignore_index, integer):
    inputs = inputs_of((40,), 5, 7, 3, device=device)
    inputs["labels"] = torch.where(inputs["labels"] < 0, ignore_index, inputs["labels"]).to(integer)
    check_loss(inputs, room, ignore_index=ignore_index)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_decides_the_type_of_the_products(room, device, reduction, small_chunks):
    """float32 arguments, bfloat16 products, float32 gradients: as F.linear has it."""
    inputs = inputs_of((2, 20), 9, 33, 4, device=device)
    inputs["hidden_states"] = inputs["hidden_states"].to(HALF)  # what the layer below gives
    check_loss(inputs, room, lambda: torch.autocast(device, HALF), reduction=reduction)


def test_autocast_gives_what_half_arguments_give(room, device):
    inputs = inputs_of((20,), 9, 33, 4, device=device)
    half = {k: v.to(HALF) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.autocast(device, HALF):
        loss = linear_cross_entropy_fn(**inputs, backend=room)
    assert torch.equal(loss, linear_cross_entropy_fn(**half, backend=room))


def test_padding_has_no_gradient_and_no_probability(room, device):
    inputs = inputs_of((9,), 5, 16, 5, ignored=0, device=device)
    inputs["labels"] %= 11
    want = outcome(linear_cross_entropy_fn, inputs, vocab_size=11, backend=room)
    inputs["bias"][11:] = 1e4
    got = outcome(linear_cross_entropy_fn, inputs, vocab_size=11, backend=room)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert got["dweight"][11:].abs().max() == got["dbias"][11:].abs().max() == 0
    assert got["dweight"][:11].abs().min() > 0


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of Triton's interpreter
def test_an_ignored_token_is_nowhere(room, device, small_chunks):
    """Also one that is no number."""
    inputs = inputs_of((30,), 5, 16, 6, ignored=0.5, device=device)
    live = inputs["labels"] >= 0
    inputs["hidden_states"][~live] = float("nan")
    loss = linear_cross_entropy_fn(**inputs, reduction="none", backend=room)
    assert torch.equal(loss[~live], torch.zeros_like(loss[~live]))
    got = outcome(linear_cross_entropy_fn, inputs, backend=room)
    assert torch.equal(got["dhidden_states"][live], got["dhidden_states"][live].nan_to_num())
    assert got["loss"].isfinite()
    dead = torch.arange(len(live), device=device)[~live][0]
    inputs["labels"][dead] = 0
    loss = linear_cross_entropy_fn(**inputs, reduction="none", backend=room)
    assert loss[dead].isnan()
    assert loss[live].isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored_as_pytorch_has_it(room, device, reduction):
    inputs = inputs_of((4,), 5, 6, 7, ignored=2, device=device)
    got, want = (outcome(f, inputs, reduction=reduction) for f in (linear_cross_entropy_fn, plain))
    assert all(torch.allclose(got[name], want[name], 0, 0, equal_nan=True) for name in want), (got, want)
    assert got["loss"].isnan().all() == (reduction == "mean")


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens(leading, reduction):
    inputs = inputs_of(leading, 5, 6, 8)
    got, want = (outcome(f, inputs, reduction=reduction) for f in (linear_cross_entropy_fn, plain))
    assert all(torch.allclose(got[name], want[name], 0, 0, equal_nan=True) for name in want)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}


def test_logits_of_any_size(room, device):
    """Far from 0, where exp alone would overflow or vanish; and -inf, a word that cannot come."""
    inputs = inputs_of((20,), 5, 70, 9, device=device)
    for shift in (-1e4, 1e4):
        check_loss(inputs | {"bias": inputs["bias"] + shift}, room)
    inputs["bias"][1::2] = -torch.inf
    inputs["labels"] = torch.where(inputs["labels"] < 0, -100, inputs["labels"] // 2 * 2)
    got, want = (outcome(f, inputs) for f in (linear_cross_entropy_fn, plain))
    assert all(got[name].isfinite().all() for name in got)
    assert errors(got["dweight"], want["dweight"])[1] < 1e-5


def test_float16_keeps_small_gradients():
    """Divided by the number of tokens before it is rounded, a probability of 1e-4 would be 0 in float16."""
    tokens, columns = 4096, 4096
    inputs = inputs_of((tokens,), 4, columns, 10, torch.float16, bias=False, ignored=0)
    inputs["weight"] *= 0.01
    got = outcome(linear_cross_entropy_fn, inputs)
    wide = {k: inputs[k].double() for k in ("hidden_states", "weight")}
    exact = outcome(plain, inputs | wide)
    assert errors(got["dweight"], exact["dweight"])[1] < 0.01


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_strided_inputs(room, device, layout, small_chunks):
    inputs = inputs_of((20,), 6, 33, 11, device=device)
    relay = {
        "transposed": lambda v: v.movedim(0, -1).contiguous().movedim(-1, 0),
        "expanded": lambda v: v[:1].expand_as(v),
        "sliced": lambda v: torch.stack([v, v + 1], -1)[..., 0],
    }[layout]
    names = ("hidden_states", "weight", "labels")
    check_loss(inputs | {k: relay(inputs[k]) for k in names}, room)


def test_only_what_is_asked_for_is_computed(room, device):
    """One argument needs a gradient, the others none; and the forward alone."""
    inputs = inputs_of((9,), 5, 16, 12, device=device)
    want = outcome(linear_cross_entropy_fn, inputs, backend=room)
    for name in ("hidden_states", "weight", "bias"):
        rest = {k: v for k, v in inputs.items() if k != name}

        def alone(rest=rest, **given):
            return linear_cross_entropy_fn(**rest, **given, backend=room)

        assert torch.equal(outcome(alone, {name: inputs[name]})[f"d{name}"], want[f"d{name}"])
    given = [inputs[k] for k in ("hidden_states", "weight", "bias", "labels")]
    loss, *grads = linear_cross_entropy(*given, FLOAT, 16, -100, "mean", room, [False] * 3)
    assert torch.equal(loss, want["loss"])
    assert [g.numel() for g in grads] == [0, 0, 0]


@pytest.mark.parametrize("tokens, columns, want", [
    (16384, 50280, [2432] * 6 + [1792]), (4096, 50280, [2048] * 2), (5, 50280, [5]), (3, 2**28, [1] * 3),
])  # fmt: skip
def test_chunks_are_even_and_within_their_bytes(tokens, columns, want):
    rows = chunks.rows_of_a_chunk(tokens, columns, HALF)
    assert [min(rows, tokens - first) for first in range(0, tokens, rows)] == want


def test_gradcheck():
    inputs = inputs_of((7,), 3, 5, 13, torch.float64)
    leaves = [inputs[k].requires_grad_() for k in ("hidden_states", "weight", "bias")]
    for reduction in REDUCTIONS:

        def call(hidden_states, weight, bias, reduction=reduction):
            given = {"bias": bias, "reduction": reduction, "vocab_size": 5}
            return linear_cross_entropy_fn(hidden_states, weight, inputs["labels"], **given)

        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction):
    inputs = inputs_of((7,), 3, 5, 14, torch.float64)
    leaf = inputs["hidden_states"].requires_grad_()
    loss = linear_cross_entropy_fn(**inputs, reduction=reduction).sum()
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy_fn: differentiable once"):
        torch.autograd.grad(first.sum(), leaf)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operator_is_registered_properly(room, device, reduction):
    inputs = inputs_of((9,), 5, 16, 15, HALF, bias=reduction == "mean", device=device)
    given = [inputs[k] for k in ("hidden_states", "weight", "bias", "labels")]
    for v in given[:3]:
        v is None or v.requires_grad_()
    keep = [v is not None for v in given[:3]]
    torch.library.opcheck(linear_cross_entropy, (*given, HALF, 16, -100, reduction, room, keep))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_model_around_it_compiles_without_a_break(room, device, reduction):
    inputs = inputs_of((3, 9), 5, 16, 16, device=device)

    def model(hidden_states, weight, bias, labels):
        with torch.autocast(device, HALF):
            given = {"bias": bias, "reduction": reduction, "backend": room}
            return 2 * linear_cross_entropy_fn(hidden_states * 2, weight, labels, **given)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = outcome(compiled, inputs), outcome(model, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.gpu
@pytest.mark.triton
def test_a_label_out_of_range_on_the_gpu_is_no_number():
    inputs = inputs_of((4,), 5, 6, 18, ignored=0, device="cuda")
    inputs["labels"][1:3] = torch.tensor([6, -1])
    loss = linear_cross_entropy_fn(**inputs, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("context", ["half", "autocast"])
@pytest.mark.parametrize("shape", [((3, 1000), 768, 50280), ((2049,), 100, 50257), ((300,), 2560, 131072)])
def test_real_sizes_on_the_gpu(shape, context):
    inputs = inputs_of(*shape, 19, HALF if context == "half" else FLOAT, bias=False, device="cuda")
    inputs["weight"] /= 10
    on = (lambda: torch.autocast("cuda", HALF)) if context == "autocast" else torch.enable_grad
    check_loss(inputs, "triton", on)


@pytest.mark.gpu
@pytest.mark.triton
def test_the_logits_are_never_held():
    """16384 tokens, 50280 words: a chunk of logits, dh, dW, and the weight in the type of the products."""
    tokens, width, columns = 16384, 768, 50280
    inputs = inputs_of((tokens,), width, columns, 20, bias=False, device="cuda")
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if k in ("hidden_states", "weight")}

    def peak(function):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", HALF):
            loss = function(**inputs)
        torch.autograd.grad(loss, leaves.values())
        return torch.cuda.max_memory_allocated() - before

    held = tokens * width * (2 + 2 + 4) + columns * width * (2 + 4 + 4)
    assert peak(linear_cross_entropy_fn) <= chunks.CHUNK_BYTES + held + 2**22
    assert peak(plain) >= 3 * 4 * tokens * columns
