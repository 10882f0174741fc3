"""Prompts that are padded to one of a few lengths, or read in pieces, end as they do when read at once."""

import pytest
import torch
from model_inputs import check_logits, fast_model, reference_model, token_ids

from mamba_fast import prompt_graphs
from mamba_ref.checks import bound, check


@pytest.fixture(autouse=True)
def short_lengths(monkeypatch):
    monkeypatch.setattr(prompt_graphs, "LENGTHS", (4, 8))


def read(model, batch, prompts, device):
    """Logits behind each of `prompts`, (ids, mask), by one reader; and the states after the last one."""
    states = model.allocate_inference_cache(batch + 1, 0)
    reader = prompt_graphs.PromptGraphs(batch, states)
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    with torch.no_grad():
        found = [reader.read(model, ids, mask, pool).clone() for ids, mask in prompts]
    return found, states


@pytest.mark.parametrize("seqlens", [(3, 4, 5), (8, 1, 9), (16, 19)])
def test_prompts_one_after_another(seqlens, device):
    reference = reference_model(1)
    model, prompts = fast_model(reference, device), [token_ids(s, 2, s, device) for s in seqlens]
    found, states = read(model, 2, [(ids, None) for ids in prompts], device)
    for ids, logits in zip(prompts, found, strict=True):
        with torch.no_grad():
            whole = model(ids).logits
        whole[:, -1] = logits
        check_logits(f"{ids.shape[1]} tokens", whole, reference, [ids])
    assert all(not v[2].any() for pair in states.values() for v in pair)  # the row beyond the batch


def test_padding_of_the_prompt_itself(device):
    model, ids = fast_model(reference_model(2), device), token_ids(3, 2, 7, device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found, _ = read(model, 2, [(ids, mask)], device)
    with torch.no_grad():
        wide = fast_model(reference_model(2), device, torch.float64)
        want = [wide(row[None, skip:]).logits[0, -1] for row, skip in zip(ids, (3, 0), strict=True)]
        plain = [model(row[None, skip:]).logits[0, -1] for row, skip in zip(ids, (3, 0), strict=True)]
    check("padded rows", found[0], torch.stack(want), bound(torch.stack(plain), torch.stack(want)))


@pytest.mark.parametrize("padding", [18, 10])
def test_padding_longer_than_a_piece(padding, device):
    """Beside a row of 19 tokens, read in three pieces, one whose first token is the last of a piece."""
    model, ids = fast_model(reference_model(2), device), token_ids(3, 2, 19, device)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    states = model.allocate_inference_cache(2, 0)
    for pair in states.values():
        for v in pair:
            v.fill_(float("nan"))  # what the last prompt has left plays no part
    reader, pool = prompt_graphs.PromptGraphs(2, states), None
    if device == "cuda":
        pool = torch.cuda.graph_pool_handle()
    with torch.no_grad():
        found = reader.read(model, ids, mask, pool)
        wide = fast_model(reference_model(2), device, torch.float64)
        want = [wide(row[None, skip:]).logits[0, -1] for row, skip in zip(ids, (padding, 0), strict=True)]
        plain = [model(row[None, skip:]).logits[0, -1] for row, skip in zip(ids, (padding, 0), strict=True)]
    check("padded rows", found, torch.stack(want), bound(torch.stack(plain), torch.stack(want)))


@pytest.mark.parametrize(
    "batch, seqlen, lengths",
    [
        (1, 100, [128]),
        (32, 100, [128]),
        (33, 100, [112]),
        (33, 112, [112]),
        (33, 113, [128]),
        (5, 2500, [512, 1024, 1024]),
    ],
)
def test_many_rows_are_padded_less(monkeypatch, batch, seqlen, lengths):
    monkeypatch.setattr(prompt_graphs, "LENGTHS", (64, 128, 256, 512, 1024))
    assert prompt_graphs._lengths(batch, seqlen) == lengths


def test_another_model_is_asked_for_no_more_than_a_mask(device):
    model, ids = fast_model(reference_model(1), device), token_ids(1, 2, 5, device)

    def other(ids, inference_params, num_last_tokens, attention_mask):
        return model(ids, None, inference_params, num_last_tokens, attention_mask=attention_mask)

    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    found = []
    for asked in (model, other):
        with torch.no_grad():
            reader = prompt_graphs.PromptGraphs(2, model.allocate_inference_cache(2, 0))
            found.append(reader.read(asked, ids, None, pool).clone())
    torch.testing.assert_close(*found)


def test_only_so_many_graphs_are_kept(monkeypatch, device):
    monkeypatch.setattr(prompt_graphs, "MOST_PIECES", 2)
    monkeypatch.setattr(prompt_graphs, "MANY_TOKENS", 8)
    model, kept = fast_model(reference_model(1), device), []
    reader = prompt_graphs.PromptGraphs(2, model.allocate_inference_cache(2, 0))
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    with torch.no_grad():
        for seqlen in (5, 7, 5, 8):
            reader.read(model, token_ids(1, 2, seqlen, device), None, pool)
            kept.append([length for length, _ in reader.pieces])
    assert kept == [[5], [5, 7], [7, 5], [5, 8]]


def test_what_is_read_by_graphs():
    assert prompt_graphs.fits(1, 10**6)
    assert prompt_graphs.fits(4096, 8)
    assert not prompt_graphs.fits(4097, 8)
