"""lm-eval on our model: the scores are those of transformers on the same weights, whatever the batch size."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from harness_inputs import (
    MAX_LENGTH,
    TASKS,
    reference_model,
    save_model,
    save_tasks,
    save_tokenizer,
)
from torch import nn

from mamba_fast import compat, evaluate
from mamba_ref.checks import bound, check

NEEDED = ("lm_eval", "transformers", "accelerate", "safetensors")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_harness = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


class Logits(nn.Module):
    """The reference, as lm-eval calls a model."""

    def __init__(self, reference):
        super().__init__()
        self.reference = reference

    def forward(self, ids):
        self.logits = self.reference(ids)
        return self


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model in both forms, its tokenizer beside the one of transformers, and tasks."""
    folder = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        reference = reference_model(save_tokenizer(folder / "hf"))
        save_model(reference, folder / "hf", "hf")
        save_model(reference, folder / "published", "published")
        save_tasks(folder / "tasks", rows=7)
        yield folder, reference


@pytest.fixture(scope="module")
def score(place):
    """score(model, batch_size): what lm-eval finds on every task; model is one of its names, or an object."""
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    evaluate.register()
    folder, _ = place
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def run(model, batch_size=64, tasks=TASKS, form="hf", device="cpu", **model_args):
        if isinstance(model, str):
            model_args = {"pretrained": str(folder / form), "max_length": MAX_LENGTH} | model_args
            model = get_model(model)(batch_size=batch_size, device=device, **model_args)
        chosen = manager.load(list(tasks))
        return lm_eval.evaluate(model, chosen, bootstrap_iters=0, log_samples=True)

    return run


@pytest.fixture(scope="module")
def theirs(score):
    return score("hf")


@pytest.fixture(scope="module")
def truth(place, score):
    """Log-likelihoods by the reference in float64."""
    folder, reference = place
    model = evaluate.register()(str(folder / "hf"), max_length=MAX_LENGTH, device="cpu", batch_size=64)
    model._model = Logits(reference)
    return score(model, tasks=TASKS[:3])


def likelihoods(found, task):
    """The log-likelihood of every request of every document."""
    kept = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    values = [response for sample in kept for request in sample["resps"] for response in request]
    return torch.tensor([v[0] if isinstance(v, tuple) else v for v in values], dtype=torch.float64)


def metrics(found, task):
    """The task's numbers; perplexities as logarithms, in which they are means of log-likelihoods."""
    kept = {k: v for k, v in found["results"][task].items() if k.endswith(",none") and "_stderr" not in k}
    return {k: math.log(v) if "perplexity" in k else float(v) for k, v in kept.items()}


def check_scores(found, theirs, truth):
    """`found` has the log-likelihoods of the truth, and metrics and texts of transformers."""
    for task in TASKS[:3]:
        got, want, plain = (likelihoods(v, task) for v in (found, truth, theirs))
        check(task, got, want, bound(plain, want, torch.float32))
    for task in found["results"]:
        got, want = metrics(found, task), metrics(theirs, task)
        assert got
        assert list(got) == list(want)
        for name in got:
            if name.startswith(("acc", "exact_match")):
                assert got[name] == want[name], (task, name)
            else:  # a mean of numbers that the check above has seen
                assert got[name] == pytest.approx(want[name], rel=1e-6), (task, name)


def texts(found):
    kept = sorted(found["samples"]["local_generate_until"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in kept]


@needs_harness
@pytest.mark.parametrize("batch_size", [1, 64])
def test_scores_are_those_of_transformers(score, theirs, truth, batch_size):
    found = score("mamba_fast", batch_size)
    assert set(found["results"]) == set(TASKS)
    check_scores(found, theirs, truth)
    assert texts(found) == texts(theirs)
    assert len(set(texts(found))) >= 5


@needs_harness
@pytest.mark.gpu
def test_scores_on_a_gpu(score, theirs, truth):
    """Batches of several sizes share the captured steps, and each is left when its rows have ended."""
    found = score("mamba_fast", 3, device="cuda", dtype="float32")
    check_scores(found, theirs, truth)
    assert texts(found) == texts(theirs)


@needs_harness
def test_the_tasks_reach_every_case(place, theirs):
    """Windows, truncation, an empty context, an early stop and none; and truths that are no extremes."""
    from transformers import AutoTokenizer

    samples = theirs["samples"]
    assert any(s["arguments"][0][0] == "" for s in samples["local_multiple_choice"])
    tokenizer = AutoTokenizer.from_pretrained(place[0] / "hf")
    lengths = [len(tokenizer(s["doc"]["text"]).input_ids) for s in samples["local_loglikelihood_rolling"]]
    assert min(lengths) < MAX_LENGTH / 2 < MAX_LENGTH < max(lengths)
    assert len({len(t) for t in texts(theirs)}) > 3
    assert 0 < metrics(theirs, "local_multiple_choice")["acc,none"] < 1


@needs_harness
def test_the_mamba_wrapper_of_the_harness_loads_ours(place, score, theirs, truth):
    options = {"tokenizer": str(place[0] / "hf"), "dtype": "float32"}
    with pytest.warns(UserWarning, match="modeling_mamba"), compat.register():  # it has run: `theirs`
        found = score("mamba_ssm", tasks=TASKS[:3], form="published", **options)
    check_scores(found, theirs, truth)


@needs_harness
def test_published_form_and_its_tokenizer(place, score, theirs):
    """A folder of the published package has no tokenizer: the one named by `tokenizer` is taken."""
    task = TASKS[0]
    found = score("mamba_fast", tasks=[task], form="published", tokenizer=str(place[0] / "hf"))
    assert metrics(found, task) == metrics(theirs, task)


@needs_harness
def test_the_command_line(place, monkeypatch, capsys):
    folder, _ = place
    arguments = [
        "--model", "mamba_fast", "--model_args", f"pretrained={folder / 'hf'},max_length={MAX_LENGTH}",
        "--tasks", "local_generate_until", "--include_path", str(folder / "tasks"),
        "--device", "cpu", "--batch_size", "64", "--limit", "3", "--output_path", str(folder / "out"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    evaluate.main()
    assert "|local_generate_until|" in capsys.readouterr().out
    (written,) = (folder / "out").rglob("results_*.json")
    results = json.loads(written.read_text("utf-8"))
    assert results["n-samples"]["local_generate_until"]["effective"] == 3
    assert results["config"]["model"] == "mamba_fast"


@needs_harness
@pytest.mark.parametrize(
    "model_args, said",
    [
        ({"peft": "adapter"}, "does not take peft"),
        ({"parallelize": True}, "does not take parallelize"),
        ({"unheard": 1}, "does not take unheard"),
    ],
)
def test_an_argument_that_it_cannot_follow_is_refused(place, model_args, said):
    with pytest.raises(ValueError, match=said):
        evaluate.register()(str(place[0] / "hf"), device="cpu", **model_args)


@needs_harness
def test_sampled_text_is_reproduced_by_a_seed(place):
    folder, _ = place
    model = evaluate.register()(str(folder / "hf"), max_length=MAX_LENGTH, device="cpu")
    context = torch.tensor([[1, 2, 3], [0, 5, 6]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])

    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        return model._model_generate(context, 20, [], attention_mask=mask, **kwargs).tolist()

    kwargs = {"do_sample": True, "temperature": 0.9, "top_p": 0.9}
    assert sample(1, **kwargs) == sample(1, **kwargs) != sample(2, **kwargs)
    assert sample(1) == sample(2) == sample(2, do_sample=False, temperature=0.7)
    with pytest.raises(ValueError, match="gen_kwargs: do_sample = True expects a temperature above 0, got"):
        sample(1, do_sample=True)
    with pytest.raises(ValueError, match="gen_kwargs: mamba_fast does not take num_beams"):
        sample(1, num_beams=3)


@needs_harness
@pytest.mark.parametrize("missing", ["lm_eval", "accelerate"])
def test_the_error_without_the_harness_names_the_extra(monkeypatch, missing):
    for name in ("mamba_fast.harness_model", "lm_eval.models.huggingface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing}[.\w]* is missing: pip install 'mamba-fast\[eval\]'"):
        evaluate.main()
