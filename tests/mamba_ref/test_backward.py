"""Both forms of the hand-written backward against autograd of the torch loop, and finite differences once."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from scan_inputs import FORMS, bound64, in_float32, in_numpy, roundings, scan_inputs

from mamba_ref import selective_scan, selective_scan_numpy
from mamba_ref.backward import (
    StateBytes,
    backward_from_states,
    backward_recompute,
    scan_keeping_boundaries,
    state_bytes,
)
from mamba_ref.checks import check

OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "initial_state")
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def weights(inputs, seed=99):
    """Random dy (B, D, L) and dlast_state (B, D, N), exact in float32."""
    rng = np.random.default_rng(seed)
    batch, d_inner, seqlen = inputs["u"].shape
    shapes = (batch, d_inner, seqlen), (batch, d_inner, inputs["A"].shape[1])
    return [rng.standard_normal(shape).astype(np.float32).astype(np.float64) for shape in shapes]


def autograd(inputs, dy, dlast_state):
    """The gradients of <dy, y> + <dlast_state, last_state> by autograd through the torch loop, by name."""
    leaves = {k: inputs[k].clone().requires_grad_() for k in TENSORS if inputs[k] is not None}
    y, last_state = selective_scan(**inputs | leaves, return_last_state=True)
    loss = (torch.from_numpy(dy).to(y.dtype) * y).sum()
    if dlast_state is not None:
        loss = loss + (torch.from_numpy(dlast_state).to(y.dtype) * last_state).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        f"d{k}": torch.zeros_like(inputs[k]) if g is None else g for k, g in zip(leaves, grads, strict=True)
    }


def by_hand(inputs, dy, dlast_state, chunk=None):
    """One of the two forms, with what it needs from a forward pass."""
    inputs = in_numpy(inputs)
    initial_state = inputs.pop("initial_state")
    if chunk is None:
        _, states = selective_scan_numpy(**inputs, initial_state=initial_state, return_states=True)
        return backward_from_states(
            **inputs, dy=dy, states=states, initial_state=initial_state, dlast_state=dlast_state
        )
    *_, boundaries = scan_keeping_boundaries(**inputs, chunk=chunk, initial_state=initial_state)
    return backward_recompute(**inputs, dy=dy, boundaries=boundaries, chunk=chunk, dlast_state=dlast_state)


def agree(inputs, dy, dlast_state, chunks):
    """Compare every gradient of both forms with autograd in float64."""
    want = autograd(inputs, dy, dlast_state)
    plain = autograd(in_float32(inputs), dy, dlast_state)
    # The longest path goes through the forward scan and back, then over every sequence and token.
    count = 2 * roundings(inputs["u"].shape[2], inputs["A"].shape[1]) + inputs["u"].shape[0]
    for chunk in (None, *chunks):
        got = by_hand(inputs, dy, dlast_state, chunk)
        assert set(got) == set(want) | {"dinitial_state"}
        for name, w in want.items():
            check(f"{name} chunk {chunk}", got[name], w, bound64(plain[name], w, count))


@pytest.mark.parametrize("C", FORMS)
@pytest.mark.parametrize("B", FORMS)
def test_every_gradient_with_every_option(B, C):
    for seed, chosen in enumerate(itertools.product([False, True], repeat=len(OPTIONS) + 1)):
        inputs = scan_inputs(seed, B=B, C=C, **dict(zip(OPTIONS, chosen, strict=False)))
        dy, dlast_state = weights(inputs, seed)
        agree(inputs, dy, dlast_state if chosen[-1] else None, chunks=[2])


@pytest.mark.parametrize("seqlen", [1, 2, 63, 64, 65, 100])
@pytest.mark.parametrize("batch, d_inner, d_state, groups", [(1, 1, 1, 1), (2, 6, 5, 3), (3, 5, 7, 1)])
def test_every_gradient_at_odd_sizes_and_chunks(batch, d_inner, d_state, groups, seqlen):
    inputs = scan_inputs(1, batch, d_inner, seqlen, d_state, B="variable", C="grouped", groups=groups)
    agree(inputs, *weights(inputs), chunks=[1, 7, 64, 1000])


def test_initial_gradient_is_there_without_an_initial_state():
    inputs = scan_inputs(2, initial_state=False)
    zeros = inputs | {"initial_state": torch.zeros(2, 6, 3, dtype=torch.float64)}
    dy, dlast_state = weights(inputs)
    want, plain = (autograd(x, dy, dlast_state)["dinitial_state"] for x in (zeros, in_float32(zeros)))
    for chunk in (None, 2):
        got = by_hand(inputs, dy, dlast_state, chunk)["dinitial_state"]
        check("dinitial_state", got, want, bound64(plain, want, 2 * roundings(5, 3)))


@pytest.mark.parametrize("name", TENSORS)
def test_finite_differences_along_a_random_direction(name):
    inputs = in_numpy(scan_inputs(3, B="grouped", C="constant"))
    dy, dlast_state = weights(scan_inputs(3))
    direction = np.random.default_rng(4).standard_normal(inputs[name].shape)

    def loss(step):
        moved = inputs | {name: inputs[name] + step * direction}
        y, last_state = selective_scan_numpy(**moved, return_last_state=True)
        return (dy * y).sum() + (dlast_state * last_state).sum()

    def slope(step):
        return (loss(step) - loss(-step)) / (2 * step)

    # A central difference errs by c step^2: halving the step shows 3/4 of it. The rounding of the loss,
    # a sum over B D L N terms of at most its size, is divided by the step.
    step = 1e-4
    want = slope(step)
    terms = np.abs(dy).sum() * np.abs(selective_scan_numpy(**inputs)).max() + np.abs(dlast_state).sum()
    allowed = abs(slope(2 * step) - want) + roundings(5, 3) * 2.0**-53 * terms / step
    for chunk in (None, 2):
        tensors = {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
        got = (by_hand(tensors, dy, dlast_state, chunk)[f"d{name}"] * direction).sum()
        check(f"slope along {name}", got, want, allowed / abs(want))


def test_softplus_has_slope_one_above_20_only():
    for delta, same in ((20.5, True), (19.5, False)):
        inputs = scan_inputs(10, delta_bias=False)
        inputs["delta"] = torch.full((2, 6, 5), delta, dtype=torch.float64)
        inputs["A"] = inputs["A"] / 20  # the state must outlive such steps
        dy, dlast_state = weights(inputs)
        agree(inputs, dy, dlast_state, chunks=[2])
        _, states = selective_scan_numpy(**in_numpy(inputs), return_states=True)
        plus, without = (
            backward_from_states(
                **in_numpy(inputs) | {"delta_softplus": softplus},
                dy=dy,
                states=states,
                dlast_state=dlast_state,
            )["ddelta"]
            for softplus in (True, False)
        )
        assert np.array_equal(plus, without) == same


def test_forward_keeping_boundaries_is_the_oracle():
    inputs = in_numpy(scan_inputs(5, seqlen=65, B="grouped", C="constant"))
    y, last_state, states = selective_scan_numpy(**inputs, return_last_state=True, return_states=True)
    limit = roundings(65, 3) * 2.0**-53
    for chunk in (1, 7, 64, 100):
        got_y, got_last, boundaries = scan_keeping_boundaries(**inputs, chunk=chunk)
        check("y in chunks", got_y, y, limit)
        check("last state in chunks", got_last, last_state, limit)
        before = np.concatenate([inputs["initial_state"][:, :, None], states[:, :, :-1]], 2)
        check("states at boundaries", boundaries, before[:, :, ::chunk], limit)


@pytest.mark.parametrize("batch, seqlen", [(2, 0), (0, 5)])
def test_no_tokens_or_no_sequences(batch, seqlen):
    inputs = scan_inputs(6, batch=batch, seqlen=seqlen, B="grouped")
    dy, dlast_state = weights(inputs)
    for chunk in (None, 3):
        got = by_hand(inputs, dy, dlast_state, chunk)
        assert {f"d{k}": tuple(inputs[k].shape) for k in TENSORS} == {k: v.shape for k, v in got.items()}
        check("the state's gradient passes through", got["dinitial_state"], dlast_state, 0)
        for name in got.keys() - {"dinitial_state"}:
            assert not got[name].any()


def test_state_bytes_are_the_bytes_of_the_arrays():
    inputs = in_numpy(scan_inputs(7, seqlen=65))
    _, states = selective_scan_numpy(**inputs, return_states=True)
    assert state_bytes(2, 6, 65, 3) == StateBytes(saved=states.nbytes, working=0)
    for chunk in (1, 8, 64, 65, 100):
        *_, boundaries = scan_keeping_boundaries(**inputs, chunk=chunk)
        kept = state_bytes(2, 6, 65, 3, chunk)
        assert kept.saved == boundaries.nbytes
        assert kept.working == states[:, :, :chunk].nbytes
        assert kept.peak == boundaries.nbytes + states[:, :, :chunk].nbytes
    assert state_bytes(2, 6, 65, 3, 8, itemsize=4).peak * 2 == state_bytes(2, 6, 65, 3, 8).peak


def test_the_square_root_of_the_length_is_the_best_chunk():
    peaks = {chunk: state_bytes(1, 1, 1024, 1, chunk).peak for chunk in range(1, 1025)}
    assert min(peaks, key=peaks.get) == 32


def test_recomputation_never_holds_all_states():
    inputs = in_numpy(scan_inputs(8, 1, 32, 256, 64))
    dy, dlast_state = weights(scan_inputs(8, 1, 32, 256, 64))
    *_, boundaries = scan_keeping_boundaries(**inputs, chunk=16)
    del inputs["initial_state"]
    tracemalloc.start()
    backward_recompute(**inputs, dy=dy, boundaries=boundaries, chunk=16, dlast_state=dlast_state)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert state_bytes(1, 32, 256, 64, 16).working < peak < state_bytes(1, 32, 256, 64).saved / 2


def test_errors_name_the_argument():
    inputs = in_numpy(scan_inputs(9))
    initial_state = inputs.pop("initial_state")
    dy, dlast_state = weights(scan_inputs(9))
    _, states = selective_scan_numpy(**inputs, return_states=True)
    from_states = dict(inputs, dy=dy, states=states, initial_state=initial_state)
    recompute = dict(inputs, dy=dy, boundaries=states[:, :, :3], chunk=2)
    backward_from_states(**from_states)
    backward_recompute(**recompute)
    for wrong, error, name in [
        ({"dy": dy[:, :, 1:]}, ValueError, "dy"),
        ({"dlast_state": dlast_state[:, :, 1:]}, ValueError, "dlast_state"),
        ({"A": inputs["A"] + 0j}, TypeError, "A: got complex128"),
    ]:
        for function, arguments in ((backward_from_states, from_states), (backward_recompute, recompute)):
            with pytest.raises(error, match=name):
                function(**arguments | wrong)
    with pytest.raises(ValueError, match="states"):
        backward_from_states(**from_states | {"states": states[:, :, 1:]})
    with pytest.raises(ValueError, match="boundaries"):
        backward_recompute(**recompute | {"boundaries": states})
    with pytest.raises(ValueError, match="chunk: got 0"):
        backward_recompute(**recompute | {"chunk": 0})
    with pytest.raises(ValueError, match="chunk: got -1"):
        scan_keeping_boundaries(**inputs, chunk=-1)
    with pytest.raises(TypeError, match="A: got complex128"):
        scan_keeping_boundaries(**inputs | {"A": inputs["A"] + 0j}, chunk=2)
