"""MambaLMHeadModel.loss: that of the logits of forward, whatever lies in the rows."""

import pytest
import torch
import torch.nn.functional as F
from model_inputs import fast_model, random_states, reference_model, token_ids
from torch import nn

from mamba_ref.checks import Row, bounds, errors

SEQ_IDX = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2], [4, 4, 4, 4, 4, 4, 3, 3, 3]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
# keywords, and by hand which tokens are predicted, from those before them
FORMS = {
    "plain": ({}, [range(1, 9), range(1, 9)]),
    "seq_idx": ({"seq_idx": SEQ_IDX}, [(1, 2, 4, 5, 6, 7), (1, 2, 3, 4, 5, 7, 8)]),
    "mask": ({"attention_mask": MASK}, [range(3, 9), range(1, 6)]),
    "both": ({"seq_idx": SEQ_IDX, "attention_mask": MASK}, [(4, 5, 6, 7), range(1, 6)]),
    "cu_seqlens": ({"cu_seqlens": torch.tensor([0, 3, 3, 8, 9])}, [(1, 2, 4, 5, 6, 7)]),
}


def from_logits(model, ids, predicted, labels=None, **options):
    """Cross-entropy of the logits in front of each predicted place, in float32 at least."""
    logits = model(ids, **options).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = [(b, t) for b, places in enumerate(predicted) for t in places]
    labels = ids if labels is None else labels
    found = torch.stack([logits[b, t - 1] for b, t in rows])
    return F.cross_entropy(found, torch.stack([labels[b, t] for b, t in rows]))


def outcome(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return {"loss": loss.detach()} | dict(zip(names, grads, strict=True))


def check_loss(model, exact, ids, predicted, labels=None, autocast=False, **options):
    """Loss and gradients of every parameter against the same model in float64."""
    truth = outcome(from_logits(exact, ids, predicted, labels, **options, backend="torch"), exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        usual = outcome(from_logits(model, ids, predicted, labels, **options), model)
        got = outcome(model.loss(ids, labels, **options), model)
    limits = bounds(usual, truth)
    rows = [Row(name, *errors(got[name], truth[name]), limits[name]) for name in truth]
    assert all(row.ok for row in rows), "\n".join(map(str, rows))


def models(seed):
    reference = reference_model(seed)
    return fast_model(reference), fast_model(reference).double()


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_that_of_the_logits(form):
    options, predicted = FORMS[form]
    check_loss(*models(1), token_ids(2, len(predicted), 9), predicted, **options)


def test_under_autocast():
    check_loss(*models(3), token_ids(4, 2, 9), FORMS["plain"][1], autocast=True)


def test_labels_of_its_own():
    """Some are ignored; the others are not the tokens."""
    labels = token_ids(6, 2, 9)
    labels[0, 3:6] = labels[1, 0] = -100
    check_loss(*models(5), token_ids(7, 2, 9), [(1, 2, 6, 7, 8), range(1, 9)], labels)
    model, _ = models(5)
    want = model.loss(token_ids(7, 2, 9), labels)
    assert torch.equal(
        model.loss(token_ids(7, 2, 9), labels.masked_fill(labels < 0, -1), ignore_index=-1), want
    )


def test_packed_is_the_mean_over_what_each_gives_alone():
    model, _ = models(8)
    ids = token_ids(9, 1, 9)
    alone = [model.loss(part) * (part.shape[1] - 1) for part in ids.split([3, 5, 1], 1)[:2]]
    packed = model.loss(ids, cu_seqlens=torch.tensor([0, 3, 8, 9]))
    torch.testing.assert_close(packed, sum(alone) / 6)


def test_checkpointing_and_states():
    model, _ = models(10)
    ids, states = token_ids(11, 2, 9), random_states(model, 2, 12)
    loss, final = model.loss(
        ids, initial_states=states, return_final_states=True, gradient_checkpointing=True
    )
    output = model(ids, initial_states=states, return_final_states=True)
    want = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, want)
    assert all(
        torch.equal(a, b) for i in final for a, b in zip(final[i], output.final_states[i], strict=True)
    )


def test_a_head_of_another_kind():
    """What stands in lm_head's place is called, and its logits are held."""
    model, _ = models(13)
    ids = token_ids(14, 2, 9)
    want = model.loss(ids)
    model.lm_head = nn.Sequential(model.lm_head)
    torch.testing.assert_close(model.loss(ids), want)


def test_compiles_without_a_break():
    model, _ = models(15)
    ids = token_ids(16, 1, 9)

    def call(ids, cu_seqlens):
        return model.loss(ids, cu_seqlens=cu_seqlens)

    torch._dynamo.reset()
    edges = torch.tensor([0, 3, 8, 9])
    got = outcome(torch.compile(call, fullgraph=True, backend="aot_eager")(ids, edges), model)
    want = outcome(call(ids, edges), model)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_labels_of_another_shape_are_refused():
    model, _ = models(17)
    with pytest.raises(ValueError, match=r"^labels: expected \(B, L\) = \(2, 9\), got \(2, 8\)"):
        model.loss(token_ids(18, 2, 9), torch.zeros(2, 8, dtype=torch.int64))


def test_no_logits_are_kept():
    model, _ = models(19)
    ids, columns = token_ids(20, 2, 50), model.lm_head.weight.shape[0]

    def kept(call):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: shapes.append(v.shape) or v, lambda v: v):
            call()
        return [s for s in shapes if s.numel() >= ids.numel() // 2 * columns and s[-1] == columns]

    assert kept(lambda: from_logits(model, ids, [range(1, 50)] * 2))
    assert not kept(lambda: model.loss(ids))
