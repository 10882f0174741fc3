"""Logits and greedy text of the same weights: reference, every backend, in every form of running it."""

import itertools

import pytest
import torch
from model_inputs import VOCAB, check_logits, fast_model, reference_model, token_ids

from mamba_fast import InferenceParams
from mamba_ref.checks import check

CUTS = (0, 5, 6, 8, 9)  # pieces of a row: longer than the convolution, one token, shorter than it
ON_CPU = ["torch", pytest.param("numba", marks=pytest.mark.numba)]  # quick enough for more of each


@torch.no_grad()
def in_pieces(model, ids, cuts, **options):
    """Logits of ids read piece by piece through one InferenceParams."""
    params, logits = InferenceParams(max_seqlen=ids.shape[1], max_batch_size=len(ids)), []
    for start, end in itertools.pairwise(cuts):
        logits.append(model(ids[:, start:end], inference_params=params, **options).logits)
        params.seqlen_offset = end
    return torch.cat(logits, 1)


@torch.no_grad()
def greedy(model, ids, n, **options):
    """ids and the likeliest token n times, one at a time behind the prompt."""
    params = InferenceParams(max_seqlen=ids.shape[1] + n, max_batch_size=len(ids))
    out = [ids]
    for _ in range(n):
        logits = model(out[-1], inference_params=params, num_last_tokens=1, **options).logits
        params.seqlen_offset += out[-1].shape[1]
        out.append(logits[:, :, :VOCAB].argmax(-1))
    return torch.cat(out, 1)


@pytest.mark.parametrize("batch, seqlen", [(1, 1), (2, 13)])
def test_sequence_form(backend, device, batch, seqlen):
    reference, ids = reference_model(1), token_ids(2, batch, seqlen, device)
    with torch.no_grad():
        logits = fast_model(reference, device)(ids, backend=backend).logits
    check_logits("sequence", logits, reference, [ids])


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("batch, seqlen", [(2, 2), (3, 63), (1, 64), (2, 65), (1, 200)])
def test_sequence_form_of_every_length(backend, batch, seqlen):
    reference, ids = reference_model(1), token_ids(2, batch, seqlen)
    with torch.no_grad():
        logits = fast_model(reference)(ids, backend=backend).logits
    check_logits("sequence", logits, reference, [ids])


def test_step_and_chunked_forms(backend, device):
    reference, ids = reference_model(3), token_ids(4, 2, CUTS[-1], device)
    logits = in_pieces(fast_model(reference, device), ids, CUTS, backend=backend)
    check_logits("pieces", logits, reference, [ids])


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("cuts", [range(8), (0, 2, 100), (0, 66, 131)], ids=["steps", "uneven", "long"])
def test_pieces_of_every_length(backend, cuts):
    reference, ids = reference_model(3), token_ids(4, 2, cuts[-1])
    check_logits("pieces", in_pieces(fast_model(reference), ids, cuts, backend=backend), reference, [ids])


def test_packed_form(backend, device):
    reference, edges = reference_model(5), (0, 1, 6, 8, 12)
    ids = token_ids(6, 1, edges[-1], device)
    pieces = [ids[:, a:b] for a, b in itertools.pairwise(edges)]
    seq_idx = torch.cat([torch.full_like(p, 7 - k) for k, p in enumerate(pieces)], 1)
    model = fast_model(reference, device)
    with torch.no_grad():
        for packing in ({"cu_seqlens": torch.tensor(edges, device=device)}, {"seq_idx": seq_idx}):
            check_logits("packed", model(ids, backend=backend, **packing).logits, reference, pieces)


def test_greedy_text(backend, device):
    reference, ids = reference_model(7), token_ids(8, 2, 4, device)
    want = reference.greedy(ids.cpu(), 10)
    assert len(set(want[:, 4:].flatten().tolist())) >= 8  # it does not repeat one token
    assert greedy(fast_model(reference, device), ids, 10, backend=backend).tolist() == want.tolist()


def test_only_the_last_tokens():
    reference, ids = reference_model(9), token_ids(10, 2, 6)
    model = fast_model(reference)
    whole = model(ids).logits
    for n in (1, 2, 6):
        check(f"last {n}", model(ids, num_last_tokens=n).logits, whole[:, -n:], 2.0**-21)
    assert whole.shape == (2, 6, 32)


@pytest.mark.parametrize("options", [{"fused_add_norm": False}, {"residual_in_fp32": False}], ids=str)
def test_the_forms_of_the_residual_agree_in_float32(options):
    reference, ids = reference_model(11), token_ids(12, 2, 9)
    model = fast_model(reference)
    for name, value in options.items():
        setattr(model.backbone, name, value)
        for layer in model.backbone.layers:
            setattr(layer, name, value)
    check_logits(str(options), model(ids).logits, reference, [ids])


def test_the_slow_path_is_the_fast_one():
    reference, ids = reference_model(13), token_ids(14, 2, 33)
    model = fast_model(reference)
    for layer in model.backbone.layers:
        layer.mixer.use_fast_path = False
    check_logits("op by op", model(ids).logits, reference, [ids])
