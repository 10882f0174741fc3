"""What generate takes: errors that name the argument, and the forms of eos_token_id."""

import pytest
import torch
from model_inputs import fast_model, reference_model, token_ids

IDS = token_ids(32, 2, 3)


@pytest.mark.parametrize(
    "ids, options, error, message",
    [
        (IDS[0], {}, ValueError, r"input_ids: expected \(B, L\)"),
        (IDS[:, :0], {}, ValueError, r"input_ids: expected \(B, L\)"),
        (IDS.float(), {}, TypeError, "input_ids: expected a tensor of int64 or int32, got torch.float32"),
        (IDS.tolist(), {}, TypeError, "input_ids: expected a tensor of int64 or int32, got list"),
        (IDS, dict(max_length=3), ValueError, "max_length: counts the prompt of 3 tokens too, got 3"),
        (IDS, dict(teacher_outputs=IDS[:1]), ValueError, r"teacher_outputs: expected \(B, T\) with B = 2"),
        (IDS, dict(prefill_chunk=0), ValueError, "prefill_chunk: expected at least 1, got 0"),
        (IDS, dict(attention_mask=IDS[:, 1:]), ValueError, r"attention_mask: expected \(B, L\) = \(2, 3\)"),
        (IDS, dict(attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])), ValueError, "padding on the left"),
        (IDS, dict(attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]])), ValueError, "padding on the left"),
        (IDS, dict(attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])), ValueError, "padding on the left"),
        (IDS, dict(top_k=0, seed=1, generator=torch.Generator()), ValueError, "seed: expected None beside"),
        (IDS, dict(top_k=5, temperature=0), ValueError, "temperature: expected a positive number"),
        (IDS, dict(temperature="1"), TypeError, "temperature: expected a number, got '1'"),
        (IDS, dict(top_k=0, top_p=None), TypeError, "top_p: expected a number, got None"),
        (IDS, dict(max_length=None), TypeError, "max_length: expected an integer, got None"),
        (IDS, dict(max_length=9.5), TypeError, "max_length: expected an integer, got 9.5"),
        (IDS, dict(vocab_size=0), ValueError, "vocab_size: expected at least 1, got 0"),
        (IDS, dict(vocab_size=-1), ValueError, "vocab_size: expected at least 1, got -1"),
        (IDS, dict(prefill_chunk=2.0), TypeError, "prefill_chunk: expected an integer, got 2.0"),
        (IDS, dict(eos_token_id="</s>"), TypeError, "eos_token_id: expected an integer, got '</s>'"),
        (IDS, dict(eos_token_id=[1, None]), TypeError, "eos_token_id: expected an integer, got None"),
        (IDS, dict(teacher_outputs=IDS.tolist()), TypeError, "teacher_outputs: expected a torch.Tensor"),
        (IDS, dict(attention_mask=[[1] * 3] * 2), TypeError, "attention_mask: expected a torch.Tensor"),
        (IDS, dict(top_k=0, seed=1.5), TypeError, "seed: expected an integer, got 1.5"),
    ],
)
def test_misuse_is_named(ids, options, error, message):
    with pytest.raises(error, match=message):
        fast_model(reference_model(33)).generate(ids, **({"max_length": 9} | options))


def test_the_tokens_that_end_a_row_in_every_form():
    model = fast_model(reference_model(34))
    want = model.generate(IDS, 40, eos_token_id=[9, 17])
    for several in ((9, 17), torch.tensor([9, 17]), [torch.tensor(9), torch.tensor(17)]):
        assert torch.equal(model.generate(IDS, 40, eos_token_id=several), want)
    assert model.generate(IDS, 40, eos_token_id={9, 17}).shape == want.shape
    one = model.generate(IDS, 40, eos_token_id=9)
    assert torch.equal(model.generate(IDS, 40, eos_token_id=torch.tensor(9)), one)
    assert not torch.equal(one, model.generate(IDS, 40))
