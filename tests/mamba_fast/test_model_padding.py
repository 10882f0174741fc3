"""attention_mask: a padded row gives what the row gives unpadded, its states included."""

import pytest
import torch
from model_inputs import check_logits, fast_model, random_states, reference_model, token_ids

from mamba_fast import InferenceParams
from mamba_ref.checks import bound, check

LENGTHS = (9, 1, 3, 5)  # real tokens of each row: whole, one, as many as the convolution's taps, more


def padded(seed, side, device="cpu"):
    """ids (B, L), mask, and the rows without their padding."""
    ids = token_ids(seed, len(LENGTHS), max(LENGTHS), device)
    mask = torch.zeros_like(ids)
    for row, n in zip(mask, LENGTHS, strict=True):
        row[-n:] = 1 if side == "left" else row[-n:]
        if side == "right":
            row[:n] = 1
    return ids, mask, [ids[b : b + 1, m == 1] for b, m in enumerate(mask)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_row(backend, device, side):
    reference = reference_model(1)
    ids, mask, rows = padded(2, side, device)
    with torch.no_grad():
        logits = fast_model(reference, device)(ids, attention_mask=mask, backend=backend).logits
    for b, row in enumerate(rows):
        check_logits(f"row {b}", logits[b : b + 1, mask[b] == 1], reference, [row])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_steps_behind_a_padded_prompt(side):
    reference = reference_model(3)
    (ids, mask, rows), more = padded(4, side), token_ids(5, len(LENGTHS), 3)
    model, params = fast_model(reference), InferenceParams(max_seqlen=20, max_batch_size=len(LENGTHS))
    model(ids, inference_params=params, attention_mask=mask)
    params.seqlen_offset += ids.shape[1]
    steps = [model(more[:, t : t + 1], inference_params=params).logits for t in range(3)]
    logits = torch.cat(steps, 1)
    for b, row in enumerate(rows):
        whole = torch.cat([row, more[b : b + 1]], 1)
        want = reference(whole)[:, -3:]
        plain = fast_model(reference)(whole, backend="torch").logits[:, -3:]
        check(f"row {b}", logits[b : b + 1], want, bound(plain, want))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_prompt_in_pieces(side):
    """Some pieces hold no real token of a row; others begin or end in the middle of one."""
    reference, (ids, mask, _) = reference_model(6), padded(7, side)
    model, params = fast_model(reference), InferenceParams(max_seqlen=20, max_batch_size=len(LENGTHS))
    model(ids, inference_params=params, attention_mask=mask)
    want = params.key_value_memory_dict
    pieces = InferenceParams(max_seqlen=20, max_batch_size=len(LENGTHS))
    for start, end in ((0, 2), (2, 3), (3, 8), (8, 9)):
        model(ids[:, start:end], inference_params=pieces, attention_mask=mask[:, start:end])
        pieces.seqlen_offset = end
    for i, states in pieces.key_value_memory_dict.items():
        for name, got, one in zip(("conv_state", "ssm_state"), states, want[i], strict=True):
            check(f"layer {i} {name}", got, one, 2.0**-19)  # a dozen roundings of each piece


@torch.no_grad()
def test_padding_changes_no_state():
    """A row without a real token keeps its states bit for bit, in the convolution and in the scan."""
    model, ids = fast_model(reference_model(8)), token_ids(9, 2, 4)
    states = random_states(model, 2, 10)
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]])
    out = model(ids, attention_mask=mask, initial_states=states, return_final_states=True)
    for i, pair in out.final_states.items():
        for got, was in zip(pair, states[i], strict=True):
            assert torch.equal(got[0], was[0])
            assert not torch.equal(got[1], was[1])


def test_what_stands_at_padding_does_not_matter():
    """Neither for the logits nor for a gradient; and no gradient reaches the embedding through it."""
    model = fast_model(reference_model(11))
    ids, mask, _ = padded(12, "left")
    real = mask == 1
    results = []
    for fill in (3, 20):
        model.zero_grad()
        logits = model(ids.where(real, fill), attention_mask=mask).logits[real]
        logits.square().sum().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_padding_inside_a_packed_row():
    """seq_idx beside a mask: the padding between two sequences belongs to neither."""
    reference = reference_model(13)
    ids = token_ids(14, 1, 11)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]])
    seq_idx = torch.tensor([[5, 0, 0, 0, 9, 0, 1, 1, 1, 1, 7]])
    out = fast_model(reference)(ids, attention_mask=mask, seq_idx=seq_idx, return_final_states=True)
    pieces = [ids[:, 1:4], ids[:, 6:10]]
    check_logits("packed and padded", out.logits[:, mask[0] == 1], reference, pieces)
    alone = fast_model(reference)(pieces[1], return_final_states=True).final_states
    for i, pair in out.final_states.items():
        for got, want in zip(pair, alone[i], strict=True):
            check(f"layer {i}", got, want, 2.0**-19)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
def test_types_of_a_mask(dtype):
    model = fast_model(reference_model(15))
    ids, mask, _ = padded(16, "left")
    want = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, want)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (torch.ones(2, 3), TypeError, "attention_mask: expected bool, int32, int64, got float32"),
        ([[1, 1, 1]], TypeError, "attention_mask: expected a torch.Tensor, got list"),
        (torch.ones(2, 4, dtype=torch.bool), ValueError, r"attention_mask: expected \(B, L\) = \(2, 3\)"),
    ],
    ids=["type", "list", "shape"],
)
def test_a_wrong_mask_is_named(mask, error, message):
    with pytest.raises(error, match=message):
        fast_model(reference_model(17))(token_ids(18, 2, 3), attention_mask=mask)
