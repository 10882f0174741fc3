"""The causal convolution, its step form and its states against the float64 oracle, on every backend."""

import functools
from itertools import pairwise

import pytest
import torch
from conv_inputs import check_agrees, conv_inputs, outcome, turned

from mamba_fast import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from mamba_ref.causal_conv import causal_conv, causal_conv_numpy
from mamba_ref.checks import bounds, errors

PACKED = torch.tensor([[5] * 9 + [-1] * 3 + [2] + [0] * 20 + [-7] * 2 + [1] * 5, [3] * 16 + [4] * 24])


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    return request.param


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("seqlen", [1, 2, 3, 31, 33, 65])
def test_every_length(backend, device, seqlen, layout):
    check_agrees(conv_inputs(seqlen, seqlen=seqlen, layout=layout), backend, device)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("width, bias, initial, activation",
                         [(2, True, False, None), (3, False, True, "swish"), (4, False, False, "silu"),
                          (2, False, True, "silu"), (3, True, False, None)])  # fmt: skip
def test_every_width_and_option(backend, device, layout, width, bias, initial, activation):
    inputs = conv_inputs(2, 1, 6, 20, width, bias=bias, initial_states=initial, layout=layout)
    want = "silu" if activation else None
    check_agrees(inputs, backend, device, activation=want)
    named = {k: v.float().to(device) for k, v in inputs.items() if v is not None}
    same = [causal_conv1d_fn(**named, activation=a, backend=backend) for a in (want, activation)]
    assert torch.equal(*same)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("batch, d_inner", [(3, 1), (1, 17), (2, 8)])
def test_every_size(backend, device, batch, d_inner, layout):
    check_agrees(conv_inputs(d_inner, batch, d_inner, 16, layout=layout), backend, device)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("batch, seqlen", [(1, 300), (5, 40)])
def test_programs_share_out_a_channel(backend, device, batch, seqlen, layout):
    """Along its time or among batch elements, unevenly; dweight is the sum of what they find."""
    check_agrees(conv_inputs(seqlen, batch, 1, seqlen, layout=layout), backend, device)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("width, initial", [(4, True), (3, False)])
def test_packed_rows(backend, device, layout, width, initial):
    inputs = conv_inputs(3, 2, 5, 40, width, initial_states=initial, layout=layout)
    check_agrees(inputs, backend, device, seq_idx=PACKED)


def test_packed_rows_that_are_shorter_than_the_taps(backend, device):
    for marks in ([[1, 1, 1]], [[1, 2, 1]], [[1, 1, -1]], [[-1, 1, 1]]):
        check_agrees(conv_inputs(4, 1, 3, 3), backend, device, seq_idx=torch.tensor(marks, dtype=torch.int32))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype, wide", [(torch.bfloat16, torch.float32), (torch.float16, None)])
def test_half_precision(backend, device, dtype, wide, layout):
    check_agrees(conv_inputs(5, 2, 8, 40, layout=layout), backend, device, dtype, wide=wide)


LAYOUTS = {
    "half of a row": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "half of a column": lambda x: turned(torch.cat([x, x], 1))[:, : x.shape[1]],
    "every other step": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_give_the_same_result(backend, device, layout):
    """Also with expanded cotangents, which lie in memory as neither x does."""
    inputs = {k: v.float().to(device) for k, v in conv_inputs(6, 2, 8, 24).items()}
    found = []
    for relay in (LAYOUTS[layout], lambda x: LAYOUTS[layout](x).contiguous()):
        leaf = inputs["x"].clone().requires_grad_()
        y = causal_conv1d_fn(**inputs | {"x": relay(leaf)}, activation="silu", backend=backend)
        found.append([y])
        for cotangent in (torch.ones(1, device=device), torch.linspace(-1, 1, 24, device=device)):
            found[-1] += torch.autograd.grad(y, leaf, cotangent.expand_as(y), retain_graph=True)
    # The same bits in the interpreter, and elsewhere sums in another order: dx is the sum of a few numbers.
    limit = 16 * torch.finfo(torch.float32).eps if torch.cuda.is_available() or backend == "torch" else 0
    assert max(errors(got, want)[1] for got, want in zip(*found, strict=True)) <= limit


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_nan_stays_in_its_channel_sequence_and_reach(backend, device, layout):
    inputs = {k: v.float().to(device) for k, v in conv_inputs(7, 2, 5, 40, layout=layout).items()}
    run = functools.partial(causal_conv1d_fn, seq_idx=PACKED.to(device), activation="silu",
                            return_final_states=True, backend=backend)  # fmt: skip
    clean = outcome(run, inputs)
    inputs["x"][0, 3, [10, 14, 31]] = float("nan")  # in padding; in the sequence of tokens 13 to 32
    dirty = outcome(run, inputs)
    assert dirty["y"][0, 3, [14, 15, 16, 17, 31, 32]].isnan().all()
    assert dirty["dx"][0, 3, [14, 17, 31, 32]].isnan().all()
    for name in ("y", "dx"):
        clean[name][0, 3, 13:33] = dirty[name][0, 3, 13:33] = 0
    clean["dweight"][3] = dirty["dweight"][3] = clean["dbias"][3] = dirty["dbias"][3] = 0
    for name in clean:
        assert torch.equal(dirty[name], clean[name]), name


def test_gradcheck_and_gradgradcheck():
    for seq_idx in (None, torch.tensor([[0, 0, 1, 1, -1, 2]])):
        inputs = conv_inputs(8, 1, 2, 6, 3)

        def run(*leaves, names=tuple(inputs), seq_idx=seq_idx):
            named = dict(zip(names, leaves, strict=True))
            return causal_conv1d_fn(**named, seq_idx=seq_idx, activation="silu", return_final_states=True)

        leaves = [v.requires_grad_() for v in inputs.values()]
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("shape", [(2, 5, 0), (0, 5, 7), (2, 0, 7)])
def test_empty_input(shape):
    inputs = {k: v.float() for k, v in conv_inputs(9, *shape).items()}
    run = functools.partial(causal_conv1d_fn, return_final_states=True)
    got = outcome(run, inputs)
    assert got["y"].shape == shape
    assert torch.equal(
        got["final_states"], inputs["initial_states"] if shape[2] == 0 else got["dinitial_states"]
    )


def test_final_states_go_where_they_are_asked_to_go(backend, device):
    inputs = {k: v.float().to(device) for k, v in conv_inputs(10).items()}
    out = torch.empty(2, 5, 3, device=device)
    y, final = causal_conv1d_fn(**inputs, return_final_states=True, final_states_out=out, backend=backend)
    assert final is out
    assert torch.equal(final, inputs["x"][..., -3:])
    tail = causal_conv1d_fn(**inputs | {"initial_states": final}, backend=backend)
    both = {"x": torch.cat([inputs["x"], inputs["x"]], -1)}
    assert errors(torch.cat([y, tail], -1), causal_conv1d_fn(**inputs | both, backend=backend))[1] < 1e-6


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(
    "state_len, width, parts",
    [(4, 4, (1, 1, 1, 2, 3)), (3, 4, (5, 1, 2)), (6, 3, (4, 1, 3)), (1, 2, (1, 1, 2))],
)
def test_token_by_token_is_the_whole(backend, device, state_len, width, parts, circular):
    """Several tokens a call, rows of a larger table of states, and a row of padding between them."""
    inputs = conv_inputs(11, 3, 5, sum(parts), width, initial_states=False)
    given = {k: v.float().to(device) for k, v in inputs.items() if v is not None}
    table = torch.full((6, 5, state_len), 7.0, device=device)
    indices, seen, found = torch.tensor([4, -3, 1], device=device), 0, []
    table[indices[::2]] = 0
    for tokens in parts:
        x = given["x"][..., seen : seen + tokens]
        x = x[..., 0] if tokens == 1 else x
        count = torch.tensor([seen, 0, seen], device=device, dtype=torch.int32) if circular else None
        y = causal_conv1d_update(
            x, table, given["weight"], given["bias"], "silu", count, indices, backend=backend
        )
        found.append(y[..., None] if tokens == 1 else y)
        seen += tokens
    got = torch.cat(found, -1)
    truth = causal_conv_numpy(*(v.double().numpy() for v in inputs.values() if v is not None), "silu")[::2]
    plain = causal_conv(*(v.cpu() for v in given.values()), "silu")[::2]
    limit = bounds({"y": plain}, {"y": truth})["y"]
    assert errors(got[::2], truth)[1] <= limit
    assert (got[1] == 0).all()
    assert (table[[0, 2, 3, 5]] == 7).all()
    last = torch.cat([torch.zeros(3, 5, state_len), inputs["x"]], -1)[..., -state_len:][::2].float()
    order = [n % state_len for n in range(seen - state_len, seen)] if circular else list(range(state_len))
    assert torch.equal(table[indices[::2]][..., order].cpu(), last)


def test_a_token_whose_rows_overlap(backend, device):
    x = torch.arange(10.0, device=device).as_strided((3, 7), (1, 1))
    taps = torch.tensor([0.0, 0, 0, 1], device=device).repeat(7, 1)
    state = torch.zeros(3, 7, 4, device=device)
    y = causal_conv1d_update(x, state, taps, pad_slot_id=0, backend=backend)  # without indices: no padding
    assert torch.equal(y, x)
    assert torch.equal(state[..., 3], x)


def test_any_slot_may_mean_padding(backend, device):
    inputs = {
        k: v.to(device) for k, v in conv_inputs(12, 3, 5, 2, initial_states=False).items() if v is not None
    }
    inputs = {k: v.float() for k, v in inputs.items()}
    table = torch.full((3, 5, 3), 2.0, device=device)
    indices = torch.tensor([0, 2, -9], device=device, dtype=torch.int32)
    x, weight, bias = inputs.values()
    y = causal_conv1d_update(x, table, weight, bias, None, None, indices, pad_slot_id=2, backend=backend)
    assert (y[1:] == 0).all()
    assert (table[1:] == 2).all()
    assert torch.equal(table[0, :, 1:], x[0])


def test_the_states_of_packed_sequences(backend, device):
    x = conv_inputs(13, 1, 7, 12)["x"][0].T.float().to(device)
    edges = [0, 1, 1, 9, 12]
    states = causal_conv1d_varlen_states(x, torch.tensor(edges, device=device), 5, backend=backend)
    for k, (first, end) in enumerate(pairwise(edges)):
        own = x[max(first, end - 5) : end].T
        want = torch.cat([torch.zeros(7, 5 - own.shape[1], device=device), own], -1)
        assert torch.equal(states[k], want)


@pytest.mark.triton
def test_triton_gradients_are_bitwise_repeatable():
    inputs = {
        k: v.float().to("cuda" if torch.cuda.is_available() else "cpu")
        for k, v in conv_inputs(16, 2, 5, 70).items()
    }
    run = functools.partial(causal_conv1d_fn, activation="silu", return_final_states=True, backend="triton")
    first, second = outcome(run, inputs), outcome(run, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 512, 1000), (1, 70, 4097), (3, 24, 513)])
def test_real_sizes_on_the_gpu(shape, dtype, layout):
    seq_idx = (torch.arange(shape[2]) // 300)[None].repeat(shape[0], 1)
    for marks in (None, seq_idx):
        check_agrees(conv_inputs(17, *shape, layout=layout), "triton", "cuda", dtype, seq_idx=marks)
