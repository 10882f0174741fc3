"""generate: greedy text is that of the sequence form, rows are alone, and what a caller may ask for."""

import copy

import pytest
import torch
from generation_inputs import SAMPLED, Listener, a_token_of, text_of
from model_inputs import D_MODEL, N_LAYER, VOCAB, fast_model, reference_model, token_ids

from mamba_fast import MambaConfig, MambaLMHeadModel, decoding, generation
from mamba_ref.checks import bound, check


def greedy(reference, ids, new, vocab=VOCAB):
    """The slow way: the whole text again for every token, in float64."""
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, reference(ids)[:, -1:, :vocab].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("prompt", [1, 2, 7])
def test_greedy_text_is_that_of_the_sequence_form(prompt):
    reference, ids = reference_model(1), token_ids(2, 3, prompt)
    want = greedy(reference, ids, 12)
    assert torch.equal(text_of(fast_model(reference), ids, 12, vocab_size=VOCAB), want)
    assert len(want[:, prompt:].unique()) > 3  # not one token again and again


def test_greedy_text_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, use_mambapy=False
    )
    torch.manual_seed(3)
    theirs = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += torch.randn_like(p) / 4
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(1, 32, (2, 9), generator=torch.Generator().manual_seed(4))
    want = theirs.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    ours = MambaLMHeadModel.from_pretrained(tmp_path)
    got = text_of(ours, ids, 20)
    # transformers was kept from ending: 0, its eos, could not be chosen.
    if (got == 0).any():
        pytest.fail("choose another seed: the text has the token that transformers may not choose")
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "options", [{}, SAMPLED, dict(repetition_penalty=1.7)], ids=["greedy", "sampled", "pen"]
)
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_left_padded_row_is_the_row(options, chunk):
    """Alone and unpadded it has the same text, the randomness being the same."""
    model, lengths = fast_model(reference_model(5)), (6, 1, 9)
    ids = token_ids(6, 3, 9)
    mask = torch.stack([(torch.arange(9) >= 9 - n).long() for n in lengths])
    whole = text_of(
        model, ids, 10, attention_mask=mask, prefill_chunk=chunk, vocab_size=VOCAB, seed=7, **options
    )
    assert torch.equal(whole[:, :9], ids)
    # Every row at its place among unpadded rows of its own length: the same random numbers are its own.
    for b, n in enumerate(lengths):
        rows = ids[b : b + 1, 9 - n :].expand(3, -1)
        alone = text_of(model, rows, 10, vocab_size=VOCAB, seed=7, **options)
        assert torch.equal(whole[b, 9:], alone[b, n:])
    other = ids.where(mask == 1, 3)  # what stands at padding does not matter, to the penalty neither
    again = text_of(model, other, 10, attention_mask=mask.bool(), vocab_size=VOCAB, seed=7, **options)
    assert torch.equal(again[:, 9:], whole[:, 9:])


def test_scores_are_the_raw_logits_of_every_new_token():
    reference, ids = reference_model(8), token_ids(9, 2, 5)
    model = fast_model(reference)
    asked = dict(return_dict_in_generate=True, output_scores=True)
    out = text_of(model, ids, 6, vocab_size=VOCAB, repetition_penalty=3.0, seed=1, **SAMPLED, **asked)
    assert len(out.scores) == 6
    with torch.no_grad():
        want, plain = reference(out.sequences), copy.deepcopy(reference).float()(out.sequences)
    at = slice(4, -1)
    got = torch.stack(out.scores, 1)
    check("scores", got, want[:, at, :VOCAB], bound(plain[:, at, :VOCAB], want[:, at, :VOCAB]))
    out = text_of(model, ids, 6, return_dict_in_generate=True)
    assert out.scores is None
    sequences, scores = text_of(model, ids, 2, **asked)
    assert torch.equal(sequences, out.sequences[:, :7])
    assert scores[0].shape == (2, model.lm_head.weight.shape[0])


def test_a_teacher_is_followed_as_far_as_it_goes():
    reference, ids = reference_model(10), token_ids(11, 2, 3)
    model, teacher = fast_model(reference), token_ids(12, 2, 8)
    out = text_of(
        model,
        ids,
        9,
        teacher_outputs=teacher,
        return_dict_in_generate=True,
        output_scores=True,
        vocab_size=VOCAB,
    )
    assert torch.equal(out.sequences[:, 3:8], teacher[:, 3:])
    assert torch.equal(out.sequences, greedy(reference, out.sequences[:, :8], 4))
    with torch.no_grad():
        want = reference(out.sequences)[:, 2:-1, :VOCAB]
        plain = copy.deepcopy(reference).float()(out.sequences)[:, 2:-1, :VOCAB]
    check("scores", torch.stack(out.scores, 1), want, bound(plain, want))
    short = text_of(model, ids, 2, teacher_outputs=teacher)
    assert torch.equal(short[:, 3:], teacher[:, 3:5])


def test_a_repetition_penalty_counts_prompt_and_text():
    reference, ids, penalty = reference_model(13), token_ids(14, 2, 4), 2.5
    text = ids
    with torch.no_grad():
        for _ in range(12):
            logits = reference(text)[:, -1, :VOCAB]
            for row, seen in zip(logits, text, strict=True):
                for token in set(seen.tolist()):
                    row[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    model = fast_model(reference)
    assert torch.equal(text_of(model, ids, 12, vocab_size=VOCAB, repetition_penalty=penalty), text)
    assert not torch.equal(text_of(model, ids, 12, vocab_size=VOCAB), text)


def test_every_row_ends_by_itself_and_all_end_together():
    model, ids = fast_model(reference_model(15)), token_ids(16, 3, 4)
    options = dict(vocab_size=VOCAB, repetition_penalty=9.0)  # so that no row repeats itself
    free = text_of(model, ids, 20, **options)
    ends = [a_token_of(free[:, 4:], row, at) for row, at in ((0, 2), (1, 4), (2, 3))]
    text = text_of(model, ids, 20, eos_token_id=ends, **options)
    last = 0
    for row, was in zip(text[:, 4:], free[:, 4:], strict=True):
        first = min(k for k, token in enumerate(was.tolist()) if token in ends)
        last = max(last, first)
        assert torch.equal(row[: first + 1], was[: first + 1])
        assert (row[first + 1 :] == ends[0]).all()
    assert text.shape[1] == 4 + last + 1 < 24
    one = text_of(model, ids[:1], 20, eos_token_id=ends[0], **options)
    assert one.shape[1] < 24
    assert torch.equal(one[0], free[0, : one.shape[1]])
    assert one[0, -1] == ends[0]


def test_an_end_in_the_prompt_ends_nothing():
    model, ids = fast_model(reference_model(17)), token_ids(18, 1, 4)
    free = text_of(model, ids, 3, vocab_size=VOCAB)
    unused = next(t for t in range(VOCAB) if t not in free[0, 4:].tolist())
    ids[0, -1] = unused
    assert text_of(model, ids, 3, eos_token_id=unused, vocab_size=VOCAB).shape[1] >= 5


def test_a_streamer_sees_every_token_once():
    model, ids = fast_model(reference_model(19)), token_ids(20, 2, 3)
    listener = Listener()
    text = text_of(model, ids, 7, streamer=listener)
    assert listener.ended
    assert [v.shape for v in listener.put_in] == [(2, 3), *[(2, 1)] * 7]
    assert torch.equal(torch.cat(listener.put_in, 1), text)
    ended = Listener()
    row = text_of(model, ids[:1], 7, streamer=ended, eos_token_id=text[0, 5].item())
    assert torch.equal(torch.cat(ended.put_in, 1), row)
    assert row.shape[1] <= 6


def test_a_seed_decides_the_text():
    model, ids = fast_model(reference_model(21)), token_ids(22, 2, 3)
    first = text_of(model, ids, 7, seed=1, **SAMPLED)
    assert torch.equal(text_of(model, ids, 7, seed=1, **SAMPLED), first)
    assert torch.equal(text_of(model, ids, 4, seed=1, **SAMPLED), first[:, :7])
    assert not torch.equal(text_of(model, ids, 7, seed=2, **SAMPLED), first)
    assert not torch.equal(first[0, 3:], first[1, 3:])
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(text_of(model, ids, 7, generator=generator, **SAMPLED), first)
    assert not torch.equal(text_of(model, ids, 7, generator=generator, **SAMPLED), first)
    torch.manual_seed(3)
    free = text_of(model, ids, 7, **SAMPLED)
    assert not torch.equal(text_of(model, ids, 7, **SAMPLED), free)
    torch.manual_seed(3)
    assert torch.equal(text_of(model, ids, 7, **SAMPLED), free)


def test_sampled_text_has_the_probabilities_of_the_model():
    """Pairs of tokens behind one prompt, many rows at once, against products of exact probabilities."""
    reference, rows = reference_model(23), 20_000
    ids = token_ids(24, 1, 5)
    filters = dict(top_k=4, temperature=2.0)
    text = text_of(fast_model(reference), ids.expand(rows, -1), 2, vocab_size=VOCAB, seed=4, **filters)[:, 5:]

    def probabilities(prefix):
        with torch.no_grad():
            best = reference(prefix)[0, -1, :VOCAB].topk(4)
        return dict(zip(best.indices.tolist(), (best.values / 2).softmax(-1).tolist(), strict=True))

    want = {}
    for a, p in probabilities(ids).items():
        for b, q in probabilities(torch.cat([ids, torch.tensor([[a]])], 1)).items():
            want[a, b] = p * q
    counts = dict.fromkeys(want, 0)
    for pair in text.tolist():
        counts[tuple(pair)] += 1
    statistic = sum((n - rows * want[k]) ** 2 / (rows * want[k]) for k, n in counts.items())
    tail = torch.special.gammaincc(torch.tensor((len(want) - 1) / 2), torch.tensor(statistic / 2))
    assert tail > 1e-4


def test_text_longer_than_the_ring(monkeypatch):
    ring = 6
    for module in (decoding, generation):
        monkeypatch.setattr(module, "RING", ring)
    model, ids, new = fast_model(reference_model(25)), token_ids(26, 2, 3), 2 * ring + 5
    listener = Listener()
    out = text_of(
        model,
        ids,
        new,
        seed=1,
        streamer=listener,
        return_dict_in_generate=True,
        output_scores=True,
        **SAMPLED,
    )
    assert out.sequences.shape == (2, 3 + new)
    assert torch.equal(torch.cat(listener.put_in, 1), out.sequences)
    assert torch.equal(text_of(model, ids, new, seed=1, **SAMPLED), out.sequences)
    assert len(out.scores) == new
    again = text_of(model, ids, new, teacher_outputs=out.sequences)
    assert torch.equal(again, out.sequences)
    exact = text_of(model, ids, ring, seed=1, **SAMPLED)
    assert torch.equal(exact, out.sequences[:, : 3 + ring])
    monkeypatch.undo()
    assert torch.equal(text_of(model, ids, new, seed=1, **SAMPLED), out.sequences)


@pytest.mark.parametrize("new", [1, 2, 3, 6, 7, 12, 13, 20])
def test_several_steps_at_a_time_give_the_same_text(monkeypatch, new):
    """As graphs of several steps do it, where nobody looks in between; a ring has room for six tokens."""
    for module in (decoding, generation):
        monkeypatch.setattr(module, "RING", 6)
    model, ids, taken = fast_model(reference_model(27)), token_ids(28, 2, 3), []
    options = dict(seed=1, **SAMPLED)
    want = text_of(model, ids, new, output_scores=True, **options)

    def several(self, model, wanted=1, right=decoding.Decoder.advance):
        taken.append(3 if wanted >= 3 else 1)
        return sum(right(self, model) for _ in range(taken[-1]))

    monkeypatch.setattr(decoding.Decoder, "advance", several)
    assert torch.equal(text_of(model, ids, new, **options), want)
    assert sum(taken) == new - 1
    assert (3 in taken) == (new > 3)
    taken.clear()
    for looks in (dict(streamer=Listener()), dict(eos_token_id=10**6), dict(output_scores=True)):
        assert torch.equal(text_of(model, ids, new, **options, **looks), want)
    assert set(taken) <= {1}


@pytest.mark.parametrize("first", [True, False])
def test_the_mode_of_the_caller_does_not_matter(first):
    """What comes out can be trained on, also where the call stood in inference_mode."""
    model, ids = fast_model(reference_model(27)), token_ids(28, 2, 3)
    with torch.inference_mode(first):
        text = text_of(model, ids, 4)
    with torch.inference_mode(not first):
        assert torch.equal(text_of(model, ids, 4), text)
    text = text_of(model, ids, 4, cg=True)  # without effect on a CPU
    model(text).logits.square().sum().backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_timing_is_printed_without_a_gpu(capsys):
    text_of(fast_model(reference_model(29)), token_ids(30, 1, 3), 2, enable_timing=True)
    assert capsys.readouterr().out.startswith("Prompt processing + decoding time: ")


def test_half_precision_and_int32_ids():
    config = MambaConfig(d_model=D_MODEL, n_layer=N_LAYER, vocab_size=VOCAB)
    model = MambaLMHeadModel(config, dtype=torch.bfloat16)
    ids = token_ids(31, 2, 3).int()
    text = text_of(model, ids, 4, seed=1, repetition_penalty=1.2, **SAMPLED)
    assert text.dtype == torch.int64
    assert torch.equal(text[:, :3], ids.long())
