"""python -m mamba_fast.generate, on a small checkpoint and a tokenizer of bytes made here."""

import pytest
import torch

from mamba_fast import MambaConfig, MambaLMHeadModel, generate

pytest.importorskip("transformers", reason="transformers is not installed")
END = "<|endoftext|>"
PROMPT = "The state h"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 256 bytes and an end, with logits far apart, and its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    symbols = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=END).save_pretrained(path)
    torch.manual_seed(0)
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=len(symbols), tie_embeddings=False)
    model = MambaLMHeadModel(config)
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.lm_head.weight[0] = 0  # the end, which is never the likeliest
    model.save_pretrained(path)
    return path


def run(folder, capfd, arguments, prompts=(PROMPT,)):
    generate.main(["--model-name", str(folder), "--device", "cpu", "--prompt", *prompts, *arguments.split()])
    return capfd.readouterr()


def by_hand(folder, prompt, new, **options):
    """Tokens and text of the same call in Python."""
    tokenizer = generate.load_tokenizer(str(folder))
    model = MambaLMHeadModel.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    text = model.generate(
        ids, ids.shape[1] + new, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **options
    )
    return ids[0], text[0], tokenizer.decode(text[0], skip_special_tokens=True)


def test_a_prompt_is_continued(folder, capfd):
    ids, tokens, want = by_hand(folder, PROMPT, 12)
    assert len(ids) == len(PROMPT)  # a token a byte
    said = run(folder, capfd, "--genlen 12")
    assert said.out.rstrip("\n") == want.rstrip("\n")
    assert said.out.startswith(PROMPT)
    assert f"{len(tokens) - len(ids)} tokens" in said.err


def test_the_published_line_samples(folder, capfd):
    """With --topp or --temperature and no --topk, where the published script is greedy all the same."""
    flags = "--topp 0.9 --temperature 0.7 --repetition-penalty 1.2 --genlen 12 --seed"
    sampled = dict(top_k=0, top_p=0.9, temperature=0.7, repetition_penalty=1.2)
    said = {seed: run(folder, capfd, f"{flags} {seed}").out.rstrip("\n") for seed in (1, 2)}
    assert said[1] != said[2]
    for seed, out in said.items():
        assert out == by_hand(folder, PROMPT, 12, seed=seed, **sampled)[2].rstrip("\n")
    greedy = run(folder, capfd, f"{flags} 1 --topk 1").out.rstrip("\n")
    assert greedy == by_hand(folder, PROMPT, 12, repetition_penalty=1.2)[2].rstrip("\n")


def test_several_prompts_are_a_batch(folder, capfd):
    prompts = ("a", "longer than the first", "third")
    said = run(folder, capfd, "--genlen 9", prompts).out
    want = [by_hand(folder, prompt, 9)[2] for prompt in prompts]
    assert said == "".join(f"{text}\n\n" for text in want)


@pytest.mark.parametrize(
    "model_name, tokenizer",
    [
        ("state-spaces/mamba-2.8b", "EleutherAI/gpt-neox-20b"),
        ("state-spaces/mamba-2.8b-hf", "state-spaces/mamba-2.8b-hf"),
    ],
)
def test_which_tokenizer(folder, model_name, tokenizer):
    assert generate.tokenizer_of(model_name) == tokenizer
    assert generate.tokenizer_of(str(folder)) == str(folder)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--prompt a --temperature 0", "temperature: expected a positive number"),
        ("--prompt a --topp 2", "top_p: expected a number from 0 to 1"),
        ("--prompt a --genlen 0", "--genlen: expected at least 1"),
        ("", "--prompt"),
    ],
)
def test_wrong_flags_are_named(arguments, said, capfd):
    with pytest.raises(SystemExit) as stopped:
        generate.main(arguments.split())
    assert stopped.value.code == 2
    assert said in capfd.readouterr().err


def test_a_folder_without_a_model_is_named(folder, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--model-name", str(tmp_path), "--tokenizer", str(folder), "--prompt", "a"])
    assert str(tmp_path) in stopped.value.code


@pytest.mark.parametrize("prompts", [[""], ["a", ""]], ids=["alone", "in a batch"])
def test_an_empty_prompt_is_refused(folder, prompts):
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--model-name", str(folder), "--device", "cpu", "--prompt", *prompts])
    assert stopped.value.code == "--prompt: expected at least one token in each, got an empty text"


def test_a_tokenizer_of_a_larger_model_is_refused(folder, tmp_path):
    MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=16)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--model-name", str(tmp_path), "--tokenizer", str(folder), "--prompt", "z"])
    assert stopped.value.code.startswith("--tokenizer: has tokens beyond the model's 16")
