"""Packed sequences: each gives what it gives alone, its states and gradients included."""

from itertools import pairwise

import pytest
import torch
from model_inputs import fast_model, random_states, reference_model, token_ids

from mamba_fast import InferenceParams
from mamba_ref.checks import bound, check

EDGES = (0, 1, 4, 4, 6, 13)  # one token, as many as taps, none, fewer than taps, more
ROOM = 2.0**-18  # two float32 results of the same sums in another order, two layers and some fifty roundings


def alone(model, ids, edges, states=None):
    """Logits and final states of each sequence by itself."""
    found = []
    for k, (a, b) in enumerate(pairwise(edges)):
        if b > a:
            own = None if states is None else {i: tuple(v[k : k + 1] for v in p) for i, p in states.items()}
            found.append((k, model(ids[:, a:b], initial_states=own, return_final_states=True)))
    return found


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@torch.no_grad()
def test_states_of_every_sequence(dtype):
    """From given states and into returned ones; an empty sequence keeps its own."""
    model, ids = fast_model(reference_model(1)), token_ids(2, 1, EDGES[-1])
    states = random_states(model, len(EDGES) - 1, 3)
    cu_seqlens = torch.tensor(EDGES, dtype=dtype)
    out = model(ids, cu_seqlens=cu_seqlens, initial_states=states, return_final_states=True)
    apart = alone(model, ids, EDGES, states)
    check("logits", out.logits, torch.cat([o.logits for _, o in apart], 1), ROOM)
    for i, pair in out.final_states.items():
        for n, got in enumerate(pair):
            assert torch.equal(got[2], states[i][n][2])
            want = torch.cat([o.final_states[i][n] for _, o in apart])
            check(f"layer {i} state {n}", got[[k for k, _ in apart]], want, ROOM)


@torch.no_grad()
def test_a_packed_prompt_then_steps():
    """The states of a packed prefill are those of a batch: the next tokens come side by side."""
    model, ids, edges = fast_model(reference_model(4)), token_ids(5, 1, 9), (0, 2, 3, 9)
    next_ids = token_ids(6, 3, 2)
    params = InferenceParams(max_seqlen=20, max_batch_size=3)
    model(ids, inference_params=params, cu_seqlens=torch.tensor(edges))
    params.seqlen_offset = 1
    got = [model(next_ids[:, t : t + 1], inference_params=params).logits for t in range(2)]
    for k, (a, b) in enumerate(pairwise(edges)):
        want = model(torch.cat([ids[:, a:b], next_ids[k : k + 1]], 1)).logits[:, -2:]
        check(f"sequence {k}", torch.cat(got, 1)[k : k + 1], want, ROOM)


@torch.no_grad()
def test_a_packed_prompt_goes_on():
    """The next piece of each sequence, packed again: as if each had been read at once."""
    model, ids = fast_model(reference_model(7)), token_ids(8, 1, 15)
    first, second = (0, 4, 5, 8), (0, 2, 5, 7)
    params = InferenceParams(max_seqlen=20, max_batch_size=3)
    model(ids[:, :8], inference_params=params, cu_seqlens=torch.tensor(first))
    params.seqlen_offset = 1
    got = model(ids[:, 8:], inference_params=params, cu_seqlens=torch.tensor(second)).logits
    for (a, b), (c, d) in zip(pairwise(first), pairwise(second), strict=True):
        whole = torch.cat([ids[:, a:b], ids[:, 8 + c : 8 + d]], 1)
        check("second piece", got[:, c:d], model(whole).logits[:, b - a :], ROOM)


@pytest.mark.parametrize("form", ["seq_idx", "cu_seqlens"])
def test_gradients_are_those_of_the_sequences_alone(form):
    reference, ids = reference_model(9), token_ids(10, 1, EDGES[-1])
    spans = [(a, b) for a, b in pairwise(EDGES) if b > a]
    seq_idx = torch.cat([torch.full((1, b - a), k) for k, (a, b) in enumerate(spans)], 1)
    packing = {"seq_idx": seq_idx} if form == "seq_idx" else {"cu_seqlens": torch.tensor(EDGES)}
    weight = torch.randn(1, EDGES[-1], 32, generator=torch.Generator().manual_seed(11))

    def grads(model, logits):
        loss = (logits * weight.to(logits.dtype)).sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    model = fast_model(reference)
    got = grads(model, model(ids, **packing).logits)
    plain = grads(model, torch.cat([model(ids[:, a:b]).logits for a, b in spans], 1))
    exact = fast_model(reference).double()
    want = grads(exact, torch.cat([exact(ids[:, a:b]).logits for a, b in spans], 1))
    for (name, _), a, b, c in zip(model.named_parameters(), got, plain, want, strict=True):
        check(name, a, c, bound(b, c))


@torch.no_grad()
def test_final_states_belong_to_the_last_sequence_of_a_row():
    model, ids = fast_model(reference_model(12)), token_ids(13, 2, 8)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    states = random_states(model, 2, 14)
    out = model(ids, seq_idx=seq_idx, initial_states=states, return_final_states=True)
    last = model(ids[:1, 6:], return_final_states=True).final_states
    whole = model(
        ids[1:], initial_states={i: tuple(v[1:] for v in p) for i, p in states.items()},
        return_final_states=True,
    ).final_states  # fmt: skip
    for i, pair in out.final_states.items():
        for got, one, two in zip(pair, last[i], whole[i], strict=True):
            check(f"layer {i}, row 0", got[:1], one, ROOM)
            check(f"layer {i}, row 1", got[1:], two, ROOM)


@torch.no_grad()
def test_a_sequence_shorter_than_the_convolution_does_not_see_the_one_before():
    """Nor the states in front of the row; what it leaves behind is what it leaves alone."""
    model, ids = fast_model(reference_model(19)), token_ids(20, 1, 2)
    out = model(
        ids, seq_idx=torch.tensor([[0, 1]]), initial_states=random_states(model, 1, 21),
        return_final_states=True,
    )  # fmt: skip
    alone = model(ids[:, 1:], return_final_states=True)
    check("logits", out.logits[:, 1:], alone.logits, ROOM)
    for i, pair in out.final_states.items():
        for got, want in zip(pair, alone.final_states[i], strict=True):
            check(f"layer {i}", got, want, ROOM)


@pytest.mark.parametrize(
    "packing, error, message",
    [
        (dict(cu_seqlens=torch.tensor([0, 3])), ValueError, "cu_seqlens: needs a batch of 1"),
        (dict(cu_seqlens=torch.tensor([0.0, 3])), ValueError, "cu_seqlens: expected int32 or int64"),
        (dict(cu_seqlens=[0, 3]), TypeError, "cu_seqlens: expected a torch.Tensor"),
        (dict(seq_idx=torch.zeros(2, 3)), TypeError, "seq_idx: expected int32, int64, got float32"),
        (dict(seq_idx=torch.zeros(2, 4, dtype=torch.int32)), ValueError, r"seq_idx: expected \(B, L\)"),
        (
            dict(cu_seqlens=torch.tensor([0, 3]), attention_mask=torch.ones(2, 3, dtype=torch.bool)),
            ValueError, "attention_mask: expected None beside cu_seqlens",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)  # fmt: skip
def test_wrong_packing_is_named(packing, error, message):
    with pytest.raises(error, match=message):
        fast_model(reference_model(15))(token_ids(16, 2, 3), **packing)


@pytest.mark.parametrize("edges", [(0, 2), (1, 3), (0, 2, 1, 3)], ids=str)
def test_edges_must_rise_from_0_to_the_length(edges):
    with pytest.raises(ValueError, match="cu_seqlens: expected to rise from 0 to L = 3"):
        fast_model(reference_model(17))(token_ids(18, 1, 3), cu_seqlens=torch.tensor(edges))
