"""What must hold for any inputs: split, packed, permuted, causal; and what a few tiles could hide.

Hypothesis chooses the inputs for the torch and numba backends. Triton's interpreter takes a second a
call, so that it gets a few examples that cross its tiles of 32 steps.
"""

from itertools import accumulate

import pytest
import torch
from cases import at_precision, check_agrees, outcome, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_inputs import changed_at, scan_inputs

from mamba_fast import selective_scan_fn

few = settings(max_examples=25, deadline=None, derandomize=True)
on_cpu = pytest.mark.parametrize("backend", ["torch", pytest.param("numba", marks=pytest.mark.numba)])
GPU = "cuda" if torch.cuda.is_available() else "cpu"
TIMED = ("u", "delta", "B", "C", "z")
FORMS = st.sampled_from(["variable", "grouped", "constant"])
SIZES = st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 18]), st.integers(2, 130), st.integers(1, 3))


def remembering(inputs):
    """The same with steps near 0.05: a state outlives a tile. At steps near 1 it is gone in a few tokens."""
    return inputs | {"delta": inputs["delta"] - 3}


def shortened(inputs, span):
    """The same arguments for the tokens of `span` alone; what does not move in time stays."""
    moves = {k for k in TIMED if inputs[k].dim() > 2}
    return {k: v[..., span] if k in moves else v for k, v in inputs.items()}


def in_pieces(cut):
    """A scan that stops at `cut` and goes on from the state it has reached."""

    def scan(*, return_last_state, initial_state, backend, **inputs):
        y, state = [], initial_state
        for span in (slice(0, cut), slice(cut, None)):
            part, state = selective_scan_fn(
                **shortened(inputs, span), return_last_state=True, initial_state=state, backend=backend
            )
            y.append(part)
        return torch.cat(y, -1), state

    return scan


def permuted(order, axis):
    """A scan of batch elements (axis 0) or channels (axis 1) in another order, then put back in place."""
    names = ("u", "delta", "z", "initial_state", *(("B", "C") if axis == 0 else ()))
    of_channels = ("A", "D", "delta_bias") if axis == 1 else ()

    def scan(*, return_last_state, backend, **inputs):
        for name in names:
            if axis == 1 or inputs[name].dim() > 2:
                inputs[name] = inputs[name].index_select(axis, order)
        for name in (*of_channels, *(k for k in "BC" if axis == 1 and inputs[k].dim() == 2)):
            inputs[name] = inputs[name].index_select(0, order)
        back = order.argsort()
        results = selective_scan_fn(**inputs, return_last_state=return_last_state, backend=backend)
        return tuple(x.index_select(axis, back) for x in results)

    return scan


@on_cpu
@few
@given(size=SIZES, where=st.floats(0, 1), B=FORMS, C=FORMS, seed=st.integers(0, 99))
def test_a_sequence_may_be_split_anywhere(backend, size, where, B, C, seed):
    cut = 1 + round(where * (size[2] - 2))
    check_agrees(scan_inputs(seed, *size, B=B, C=C), backend, function=in_pieces(cut))


@pytest.mark.triton
@pytest.mark.parametrize("cut", [5, 32, 39])
def test_triton_may_be_split(cut):
    check_agrees(scan_inputs(1, 1, 3, 40, 2), "triton", device=GPU, function=in_pieces(cut))


@pytest.mark.parametrize("cut", [0, 5])
def test_a_piece_may_be_empty(backend, device, cut):
    check_agrees(scan_inputs(2, 1, 3, 5, 2), backend, device=device, function=in_pieces(cut))


@on_cpu
@few
@given(
    runs=st.lists(st.integers(1, 50), min_size=1, max_size=5), other=st.lists(st.integers(1, 99)),
    d_inner=st.sampled_from([2, 18]), initial_state=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_packed_rows_are_their_sequences(backend, runs, other, d_inner, initial_state, seed):
    """One row holds `runs`, its numbers 7, 2, 7, 2, ...; the other one starts new sequences elsewhere."""
    seqlen = sum(runs)
    first = torch.tensor([7, 2]).repeat(3)[: len(runs)].repeat_interleave(torch.tensor(runs))
    edges = torch.tensor([0, *accumulate(other)])
    second = torch.searchsorted(edges, torch.arange(seqlen), right=True)
    inputs = scan_inputs(seed, 2, d_inner, seqlen, 2, initial_state=initial_state)
    check_agrees(inputs, backend, packing={"seq_idx": torch.stack([first, second])})


@on_cpu
@few
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any),
    d_inner=st.sampled_from([2, 18]), initial_state=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_packing_by_cumulative_lengths_is_one_by_one(backend, lengths, d_inner, initial_state, seed):
    inputs = scan_inputs(seed, 1, d_inner, sum(lengths), 2, initial_state=False)
    if initial_state:
        inputs["initial_state"] = scan_inputs(seed, len(lengths), d_inner, 1, 2)["initial_state"]
    check_agrees(inputs, backend, packing={"cu_seqlens": torch.tensor([0, *accumulate(lengths)])})


@on_cpu
@few
@given(size=SIZES, axis=st.integers(0, 1), B=FORMS, seed=st.integers(0, 99), data=st.data())
def test_permuting_batch_or_channels_permutes_the_result(backend, size, axis, B, seed, data):
    B = "constant" if axis == 1 and B == "grouped" else B  # a channel in another group is another channel
    order = torch.tensor(data.draw(st.permutations(range(size[axis]))))
    check_agrees(scan_inputs(seed, *size, B=B), backend, function=permuted(order, axis))


@pytest.mark.triton
@pytest.mark.parametrize("axis, order", [(0, [2, 0, 1]), (1, [4, 2, 0, 1, 3])])
def test_triton_may_be_permuted(axis, order):
    order = torch.tensor(order, device=GPU)
    inputs = scan_inputs(3, 3, 5, 17, 2, B="constant")
    check_agrees(inputs, "triton", device=GPU, function=permuted(order, axis))


def assert_causal(backend, device, inputs, name, t):
    """What changes at t changes no earlier output, and what y_t is asked for no later gradient: bitwise."""
    inputs = at_precision(inputs, torch.float32, device)
    weights = weights_of(inputs)
    weights = weights[0], torch.zeros_like(weights[1])
    before = outcome(selective_scan_fn, inputs, weights, backend=backend)
    changed = inputs | {name: changed_at(inputs[name], t)}
    after = selective_scan_fn(**changed, backend=backend)
    assert torch.equal(after[..., :t], before["y"][..., :t])
    assert not torch.equal(after[..., t], before["y"][..., t])
    asked = changed_at(weights[0], t), weights[1]
    again = outcome(selective_scan_fn, inputs, asked, backend=backend)
    for name in ("du", "ddelta", "dB", "dz"):
        assert torch.equal(again[name][..., t + 1 :], before[name][..., t + 1 :]), name
        assert not torch.equal(again[name][..., t], before[name][..., t]), name


@on_cpu
@few
@given(size=SIZES, where=st.floats(0, 1), name=st.sampled_from(TIMED), seed=st.integers(0, 99))
def test_the_past_does_not_see_the_future(backend, size, where, name, seed):
    assert_causal(backend, "cpu", scan_inputs(seed, *size), name, round(where * (size[2] - 1)))


@pytest.mark.triton
@pytest.mark.parametrize("name, t", [("u", 0), ("delta", 31), ("B", 32), ("C", 33), ("z", 39)])
def test_the_past_does_not_see_the_future_in_triton(name, t):
    torch.use_deterministic_algorithms(True)  # dB is summed by atomics otherwise, in any order
    try:
        assert_causal("triton", GPU, scan_inputs(4, 1, 3, 40, 2), name, t)
    finally:
        torch.use_deterministic_algorithms(False)


PACKINGS = {  # borders inside tiles of 32 and at the edge of one, and a sequence of no tokens
    "rows": {},
    "seq_idx": {"seq_idx": torch.tensor([[3] * 9 + [1] * 31 + [2] * 24 + [1] * 6])},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 9, 9, 40, 64, 70])},
}


@pytest.mark.triton
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("order", ["parallel", "in turn"])
def test_triton_scans_its_tiles(monkeypatch, order, packing):
    """Which of the two orders a machine takes depends on its size; here each is asked for."""
    from mamba_fast.ops.selective_scan import triton_scan

    monkeypatch.setattr(triton_scan, "_PROGRAMS_A_MULTIPROCESSOR", 10**9 if order == "parallel" else 0)
    monkeypatch.setattr(triton_scan, "CHUNK", 32)
    inputs = remembering(scan_inputs(5, 1, 3, 70, 2))
    if packing == "cu_seqlens":
        inputs["initial_state"] = scan_inputs(6, 5, 3, 1, 2)["initial_state"]
    given = at_precision(inputs, torch.float32)
    plan = triton_scan._plan(given["u"], given["B"][:, None], given["C"][:, None])
    assert (plan.tiles, plan.split) == (3, order == "parallel")
    check_agrees(inputs, "triton", device=GPU, packing=PACKINGS[packing])


@on_cpu
def test_a_large_batch_of_partly_filled_blocks(backend):
    """More sequences than numba's backward has tasks, each with a last block of one channel."""
    check_agrees(scan_inputs(7, 65, 17, 3, 2), backend)


def test_small_steps_keep_their_digits(backend, device):
    """softplus(-12) is 6e-6: log(1 + e^x) as written would have three digits of it in float32."""
    inputs = scan_inputs(8, 1, 3, 5, 2, D=False, initial_state=False)
    inputs["delta"] -= 12
    check_agrees(inputs, backend, device=device)


def test_a_strong_decay_keeps_its_digits(backend, device):
    """h_t is nearly its last input: A_bar_t h_{t-1} as the difference of the two would be noise in dA."""
    inputs = scan_inputs(9, 1, 3, 5, 2, delta_softplus=False)
    inputs["delta"] = 1 + inputs["delta"] / 8
    inputs["A"] = inputs["A"] - 20
    check_agrees(inputs, backend, device=device)


def test_large_steps_do_not_overflow(backend, device):
    inputs = scan_inputs(10, 1, 3, 5, 2)
    inputs["delta"] = 50 + 40 * inputs["delta"]  # on both sides of 20, and of 88, where e^x ends in float32
    check_agrees(inputs, backend, device=device)


def test_parameters_that_are_views(backend, device):
    """Every other number of a larger tensor, as a column of a matrix is."""
    inputs = at_precision(scan_inputs(11, 2, 5, 9, 2, C="constant"), torch.float32, device)
    names = ("A", "C", "D", "delta_bias", "initial_state")
    strided = {k: torch.stack([inputs[k], inputs[k] + 1], -1)[..., 0] for k in names}
    assert not any(view.is_contiguous() for view in strided.values())
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]], dtype=torch.int32, device=device)
    got = selective_scan_fn(**inputs | strided, seq_idx=seq_idx.expand(2, -1), backend=backend)
    want = selective_scan_fn(**inputs, seq_idx=seq_idx.repeat(2, 1), backend=backend)
    assert torch.equal(got, want)
