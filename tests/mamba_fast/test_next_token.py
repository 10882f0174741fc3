"""The greedy token and its book-keeping: one Triton launch against plain Python."""

import pytest
import torch
from cases import device_of

from mamba_fast.ops.next_token import Slots, greedy_token

PLACES = 5


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def room(request):
    return request.param


def make_slots(batch, vocab, eos=(), penalty=None, seed=0):
    """Slots in the middle of a text: some rows have ended, some tokens are seen."""
    generator = torch.Generator().manual_seed(seed)
    slots = Slots(
        torch.zeros(batch, 1, dtype=torch.long),
        torch.zeros(PLACES, batch, dtype=torch.long),
        torch.full((batch,), 2),
        torch.tensor(eos, dtype=torch.long),
        (torch.rand(batch, generator=generator) < 0.4) & bool(eos),
    )
    if penalty is None:
        return slots
    seen = torch.rand(batch, vocab + 3, generator=generator) < 0.5
    return slots._replace(seen=seen, penalty=torch.tensor(penalty))


def by_hand(logits, slots):
    """Tokens of every row, and what finished and seen are then."""
    tokens, finished = [], slots.finished.tolist()
    seen = None if slots.seen is None else slots.seen.clone()
    for b, row in enumerate(logits):
        scores = row.tolist()
        if seen is not None:
            for v in seen[b, : len(scores)].nonzero()[:, 0].tolist():
                x = row[v] * slots.penalty if row[v] < 0 else row[v] / slots.penalty
                scores[v] = x.to(row.dtype).item()
        token = scores.index(max(scores))
        if finished[b]:
            token = slots.eos[0].item()
        finished[b] = finished[b] or token in slots.eos.tolist()
        if seen is not None:
            seen[b, token] = True
        tokens.append(token)
    return torch.tensor(tokens), torch.tensor(finished), seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("penalty", [None, 1.7])
@pytest.mark.parametrize("eos", [(), (3,), (3, 8, 0)])
@pytest.mark.parametrize("batch, vocab", [(1, 1), (1, 33), (3, 64), (5, 100)])
def test_a_token_of_every_row(room, batch, vocab, eos, penalty, dtype):
    device = device_of(room)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        # A slice of a wider tensor, as the padded vocabulary makes it; quarters, so that there are equals.
        wide = torch.randint(-9, 9, (batch, vocab + 3), generator=generator) / 4
        wide[:, vocab:] = 99
        logits = wide.to(dtype)[:, :vocab]
        slots = make_slots(batch, vocab, eos if vocab > 8 else (), penalty, seed)
        token, finished, seen = by_hand(logits, slots)
        there = Slots(*(v if v is None else v.to(device) for v in slots))
        greedy_token(wide.to(device, dtype)[:, :vocab], there, backend=room)
        assert torch.equal(there.token.cpu()[:, 0], token)
        assert torch.equal(there.finished.cpu(), finished)
        want = torch.zeros(PLACES, batch, dtype=torch.long)
        want[2] = token
        assert torch.equal(there.tokens.cpu(), want)
        assert (there.place == 3).all()
        if seen is not None:
            assert torch.equal(there.seen.cpu(), seen)


@pytest.mark.triton
def test_more_logits_than_a_program_takes_at_a_time(monkeypatch):
    """Equals in two tiles: the first tile's is taken, and of its own the first."""
    from mamba_fast.ops.next_token import triton_next

    monkeypatch.setattr(triton_next, "BLOCK", 32)
    device = device_of("triton")
    logits = torch.randn(3, 101, generator=torch.Generator().manual_seed(1))
    logits[0, [40, 50, 70, 100]] = 9
    logits[1, [100]] = 9
    logits[2] = -torch.inf
    slots = Slots(*(v if v is None else v.to(device) for v in make_slots(3, 101)))
    greedy_token(logits.to(device), slots, backend="triton")
    assert slots.token[:, 0].tolist() == [40, 100, 0]


def test_a_wrong_backend_is_named():
    with pytest.raises(ValueError, match="backend: expected None or one of torch, triton, got 'cuda'"):
        greedy_token(torch.zeros(1, 3), make_slots(1, 3), backend="cuda")
