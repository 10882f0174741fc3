"""A CUDA graph of one step with its choice: the text of the eager loop, captured once, for every batch."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from generation_inputs import SAMPLED, Listener, a_token_of, text_of
from model_inputs import VOCAB, fast_model, reference_model, token_ids

from mamba_fast import decoding

pytestmark = pytest.mark.gpu
KINDS = {
    "greedy": {},
    "sampled": SAMPLED,
    "top-k": dict(top_k=5, temperature=1.3),
    "min-p": dict(top_k=0, min_p=0.05),
    "penalty": dict(repetition_penalty=1.7),
    "all": dict(top_k=9, top_p=0.9, min_p=0.01, temperature=1.2, repetition_penalty=1.3),
}


def ids_of(seed, batch, seqlen):
    return token_ids(seed, batch, seqlen, "cuda")


@pytest.fixture
def captures(monkeypatch):
    """The batch and recipe of every capture, in turn."""
    made = []

    def counted(self, model, pool, right=decoding.Decoder.capture):
        made.append((len(self.slots.token), self.recipe))
        return right(self, model, pool)

    monkeypatch.setattr(decoding.Decoder, "capture", counted)
    return made


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_text_is_that_of_the_eager_loop(options):
    model, ids = fast_model(reference_model(1), "cuda"), ids_of(2, 3, 7)
    options = options | dict(vocab_size=VOCAB, seed=3)
    want = text_of(model, ids, 140, **options)  # longer than the ring
    assert torch.equal(text_of(model, ids, 140, cg=True, **options), want)
    on_cpu = text_of(fast_model(reference_model(1)), ids.cpu(), 20, **options)
    assert torch.equal(want[:, :27].cpu(), on_cpu)


def test_a_graph_is_captured_once_for_a_batch_and_kinds_of_filters(captures):
    model = fast_model(reference_model(4), "cuda")
    for seed, prompt in ((5, 3), (6, 9)):
        for batch in (2, 1):
            for top_p in (0.9, 0.5):
                ids = ids_of(seed, batch, prompt)
                options = dict(top_k=0, top_p=top_p, seed=seed)
                want = text_of(model, ids, 12, **options)
                assert torch.equal(text_of(model, ids, 12, cg=True, **options), want)
    assert [batch for batch, _ in captures] == [2, 1]
    text_of(model, ids_of(7, 1, 3), 12, cg=True)
    assert len(captures) == 3


def test_several_steps_are_one_graph_of_a_small_model_where_nobody_looks(monkeypatch):
    model, ids = fast_model(reference_model(23), "cuda"), ids_of(24, 2, 5)
    recipe, several = decoding.Recipe(), decoding.SEVERAL

    def graphs():
        return sorted(decoding.captured_decoder(model, 2, recipe).graphs)

    want = text_of(model, ids, 3 * several)
    for looks in (dict(streamer=Listener()), dict(output_scores=True)):
        assert torch.equal(text_of(model, ids, 3 * several, cg=True, **looks), want)
    assert torch.equal(text_of(model, ids, several, cg=True), want[:, : 5 + several])
    assert graphs() == [1]
    for new in (3 * several, several + 1, several + 2, 3 * several):
        assert torch.equal(text_of(model, ids, new, cg=True), want[:, : 5 + new])
    assert graphs() == [1, several]
    decoding.forget_graphs(model)
    monkeypatch.setattr(decoding, "MOST_BYTES", 0)
    assert torch.equal(text_of(model, ids, 3 * several, cg=True), want)
    assert graphs() == [1]


def test_a_smaller_batch_after_a_larger_one_and_the_other_way(captures):
    model = fast_model(reference_model(8), "cuda")
    for batch in (4, 2, 4, 1, 6, 2):
        ids = ids_of(9 + batch, batch, 5)
        assert torch.equal(text_of(model, ids, 10, cg=True), text_of(model, ids, 10))
    assert [batch for batch, _ in captures] == [4, 2, 1, 6, 2]  # six rows found no room: all anew


def test_no_more_graphs_than_are_allowed(captures, monkeypatch):
    monkeypatch.setattr(decoding, "MOST_GRAPHS", 2)
    model = fast_model(reference_model(10), "cuda")
    for batch in (3, 2, 3, 1, 3, 2):
        ids = ids_of(batch, batch, 4)
        assert torch.equal(text_of(model, ids, 6, cg=True), text_of(model, ids, 6))
    assert [batch for batch, _ in captures] == [3, 2, 1, 2]


def test_new_weights_are_seen(captures):
    model, ids = fast_model(reference_model(11), "cuda"), ids_of(12, 2, 5)
    before = text_of(model, ids, 10, cg=True)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.rand_like(p)
    after = text_of(model, ids, 10, cg=True)
    assert torch.equal(after, text_of(model, ids, 10))
    assert not torch.equal(after, before)
    assert len(captures) == 1
    model.to(torch.bfloat16)
    assert torch.equal(text_of(model, ids, 10, cg=True), text_of(model, ids, 10))
    assert len(captures) == 2


def test_padding_teacher_scores_and_streamer():
    model, ids = fast_model(reference_model(13), "cuda"), ids_of(14, 3, 9)
    mask = torch.stack([(torch.arange(9) >= n).long() for n in (3, 8, 0)]).cuda()
    teacher = torch.cat([ids, ids_of(15, 3, 4)], 1)
    found = []
    for cg in (False, True):
        listener = Listener()
        out = text_of(
            model, ids, 12, attention_mask=mask, teacher_outputs=teacher, streamer=listener, cg=cg,
            prefill_chunk=4, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        assert torch.equal(torch.cat(listener.put_in, 1), out.sequences.cpu())
        found.append(out)
    eager, graph = found
    assert torch.equal(graph.sequences, eager.sequences)
    assert torch.equal(graph.sequences[:, :13], teacher)
    torch.testing.assert_close(graph.scores, eager.scores, rtol=2**-16, atol=2**-16)


def test_rows_end_by_themselves():
    model, ids = fast_model(reference_model(15), "cuda"), ids_of(16, 3, 4)
    options = dict(vocab_size=VOCAB, repetition_penalty=9.0)
    free = text_of(model, ids, 20, **options)
    ends = [a_token_of(free[:, 4:], row, at) for row, at in ((0, 2), (1, 4), (2, 3))]
    listener = Listener()
    text = text_of(model, ids, 20, eos_token_id=ends, streamer=listener, cg=True, **options)
    assert torch.equal(text, text_of(model, ids, 20, eos_token_id=ends, **options))
    assert torch.equal(torch.cat(listener.put_in, 1), text.cpu())
    assert text.shape[1] < 24


def test_the_host_waits_for_no_token():
    model, ids = fast_model(reference_model(17), "cuda"), ids_of(18, 2, 5)
    want = text_of(model, ids, 10, cg=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        got = text_of(model, ids, 10, cg=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


def test_the_mode_of_the_caller_does_not_matter():
    model, ids = fast_model(reference_model(19), "cuda"), ids_of(20, 2, 3)
    with torch.inference_mode():
        text = text_of(model, ids, 4, cg=True)
    assert torch.equal(text_of(model, ids, 4, cg=True), text)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(text_of(model, ids, 4, cg=True), text_of(model, ids, 4))


def test_graphs_stay_out_of_copies_and_go_with_their_model():
    model, ids = fast_model(reference_model(21), "cuda"), ids_of(22, 2, 3)
    text = text_of(model, ids, 4, cg=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(text_of(other, ids, 4, cg=True), text)
    kept = weakref.ref(decoding._graphs[model])
    decoding.forget_graphs(model)
    gc.collect()
    assert kept() is None
    assert torch.equal(text_of(model, ids, 4, cg=True), text)
    kept = weakref.ref(decoding._graphs[model])
    del model, other
    gc.collect()
    assert kept() is None
