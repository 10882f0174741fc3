"""The generation bench: models by name, their checks, their limits, and what is written."""

import json

import pytest
import torch

from mamba_fast.bench import __main__ as bench
from mamba_fast.bench import generation, timing
from mamba_fast.bench import generation_models as models

CPU = torch.device("cpu")
TINY = "--promptlen 5 --genlen 4 --repeats 3"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.VOCAB, "mamba", 61)
    monkeypatch.setitem(models.VOCAB, "pythia", 64)
    monkeypatch.setattr(generation, "speeds", lambda device: {"copy_bytes_per_s": 1e10})


def result_of(arguments, tmp_path, device="cpu"):
    out = tmp_path / "result.json"
    bench.main(["generation", *arguments.split(), "--device", device, "--out", str(out)])
    return json.loads(out.read_text("utf-8"))


def test_one_command_measures_several_cases(tmp_path, capsys):
    result = result_of(
        f"--model-name random:mamba-8x2 --batch 1 3 {TINY} --case random:mamba-8x1,2,9,3", tmp_path
    )
    assert (result["bench"], result["checks"]) == ("generation", "passed")
    rows = result["rows"]
    assert [(row["case"], *row["shape"]) for row in rows] == [
        ("random:mamba-8x2", 1, 5, 4), ("random:mamba-8x2", 3, 5, 4), ("random:mamba-8x1", 2, 9, 3),
    ]  # fmt: skip
    for row in rows:
        batch, _, new = row["shape"]
        assert (row["name"], row["role"], row["dtype"]) == ("mamba_fast", "ours", "float32")
        for kind in ("total", "prompt"):
            assert 0 < row[kind]["p10"] <= row[kind]["median"] <= row[kind]["p90"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * batch * new / row["total"]["median"], rel=1e-3)
        assert row["agreement"]["alike"] == 1
        assert row["agreement"]["steps"] <= row["agreement"]["bound"] < 1e-3
        model = models.load(row["case"], CPU, torch.float32)
        assert row["token_limit"] == pytest.approx(1e3 * model.token_bytes(batch, 5) / 1e10, rel=1e-3)
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert said.count("the byte limit of a token") == len(result["findings"]) == 3
    assert "checks passed" in said


def test_pythia_is_timed_beside_it(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    names = "--model-name random:mamba-8x1 random:pythia-8x1"
    result = result_of(f"{names} {TINY} --topp 0.9 --temperature 0.7 --repetition-penalty 1.2", tmp_path)
    assert [(row["name"], row["role"]) for row in result["rows"]] == [
        ("mamba_fast", "ours"), ("transformers", "other"),
    ]  # fmt: skip
    model = models.load("random:pythia-8x1", CPU, torch.float32)
    ids = torch.ones(2, 5, dtype=torch.long)
    assert model.generate(ids, 7, generation.GREEDY).shape == (2, 12)
    weights = sum(p.numel() for p in model.model.parameters())
    assert model.token_bytes(3, 10) == 4 * (weights + 3 * 10 * 2 * 8)  # keys and values of one layer


def test_steps_that_choose_otherwise_are_refused(tmp_path, monkeypatch):
    def wrong(self, input_ids, new, sampling, right=models.Ours.generate):
        text = right(self, input_ids, new, sampling)
        text[:, -1] = (text[:, -1] + 1) % 61
        return text

    monkeypatch.setattr(models.Ours, "generate", wrong)
    with pytest.raises(SystemExit) as stopped:
        result_of(f"--model-name random:mamba-8x2 {TINY}", tmp_path)
    assert stopped.value.code.startswith("random:mamba-8x2, steps: chose a token")
    assert stopped.value.code.endswith("nothing is written")
    assert list(tmp_path.iterdir()) == []


def test_the_check_knows_half_precision_from_a_wrong_token():
    model = models.load("random:mamba-16x2", CPU, torch.bfloat16)
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    text = model.generate(ids, 6, generation.GREEDY)
    found = generation.check(model.model, text, 6, "tiny")
    assert 0 <= found["steps"] <= found["bound"]
    with torch.no_grad():
        last = model.model(text[:, :-1]).logits[:, -1]
    text[:, -1] = last.argmin(-1)
    with pytest.raises(generation.CheckFailed, match="tiny, steps: chose a token"):
        generation.check(model.model, text, 6, "tiny")


@pytest.mark.parametrize("size", models.MAMBA)
def test_a_token_moves_weights_and_states(size, monkeypatch):
    monkeypatch.setitem(models.VOCAB, "mamba", 50277)
    model = models.load(f"random:mamba-{size}", torch.device("meta"), torch.float16)
    weights = sum(p.numel() for p in model.model.parameters())
    counts = {"130m": 129135360, "370m": 371516416, "790m": 793204224, "1.4b": 1372178432, "2.8b": 2768345600}
    assert weights == counts[size]
    d_model, n_layer = models.MAMBA[size]
    single = n_layer * 2 * d_model * (16 + 1)  # A_log and D stay float32
    states = n_layer * 2 * d_model * (16 + 4) * 2
    assert model.token_bytes(128, 1) == 2 * weights + 2 * single + 2 * 128 * states


def test_a_prompt_of_text_is_continued_and_shown(tmp_path, monkeypatch, capsys):
    class Words:
        def __call__(self, text, return_tensors):
            return type("Batch", (), {"input_ids": torch.tensor([[len(w) for w in text.split()]])})

        def decode(self, tokens, skip_special_tokens):
            return " ".join("x" * token for token in tokens.tolist())

    monkeypatch.setattr(generation, "load_tokenizer", {"EleutherAI/gpt-neox-20b": Words()}.get)
    out = tmp_path / "result.json"
    command = ["generation", "--model-name", "random:mamba-8x1", "--prompt", "some words here"]
    bench.main([*command, *TINY.split(), "--batch", "2", "--device", "cpu", "--out", str(out)])
    (row,) = json.loads(out.read_text("utf-8"))["rows"]
    assert row["shape"] == [2, 3, 4]
    said = capsys.readouterr().out
    assert said.startswith("xxxx xxxxx xxxx ")
    assert len(said.splitlines()[0].split(" ")) == 3 + 4


def test_whose_tokenizer_reads_the_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "load_tokenizer", lambda name: name)
    (tmp_path / "tokenizer.json").touch()
    for name in (str(tmp_path), "EleutherAI/pythia-70m", "state-spaces/mamba-130m-hf"):
        assert generation.tokenizer_of(name) == name
    for name in ("state-spaces/mamba-130m", "random:pythia-70m"):
        assert generation.tokenizer_of(name) == "EleutherAI/gpt-neox-20b"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--case a,1,2", "--case: expected NAME,BATCH,PROMPTLEN,GENLEN, got a,1,2"),
        ("--case a,1,x,3", "--case: expected NAME,BATCH,PROMPTLEN,GENLEN"),
        ("--genlen 1", "at least 2 for --genlen"),
        ("--batch 0", "expected at least 1"),
        ("--topp 7", "top_p: expected a number from 0 to 1"),
    ],
)
def test_wrong_flags_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench.main(["generation", *arguments.split()])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["random:mamba-9b", "random:pythia-3b", "random:rwkv-1b"])
def test_an_unknown_size_is_named(name, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        result_of(f"--model-name {name}", tmp_path)
    assert "--model-name: expected" in stopped.value.code


def test_the_cases_of_the_published_script():
    options = generation.parse([])
    assert options.cases == [("state-spaces/mamba-130m", 1, 100, 100)]
    assert generation.sampling_of(options) == generation.GREEDY


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "speeds", timing.speeds)
    names = "random:mamba-64x2 random:pythia-64x2"
    result = result_of(f"--model-name {names} --batch 1 3 {TINY} --peer", tmp_path, "cuda")
    assert {row["dtype"] for row in result["rows"]} == {"float16"}
    assert all(row["token_limit"] > 0 for row in result["rows"])
