"""What one step does, and what a run leaves behind."""

import json
from dataclasses import replace

import pytest
import torch
from train_inputs import tiny, untimed, write_texts

from mamba_fast import MambaLMHeadModel
from mamba_fast.train import Processes, Run, evaluate, train
from mamba_fast.train.metrics import Metrics, read_metrics
from mamba_fast.train.tasks import IGNORED
from mamba_ref.checks import bound, check


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts", seed=5)


def parameters(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def steps(run, count=1):
    for _ in range(count):
        run.begin_step()
        loss, norm = run.advance()
        run.step += 1
    return loss, norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_and_states_are_float32_whatever_autocast_is(tmp_path, texts, dtype):
    run = Run(tiny(tmp_path, dtype=dtype))
    before = parameters(run)
    seen = []
    run.model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    steps(run, 3)
    logits, _ = run.objective.logits(next(run.data.validation(1)))
    assert logits.dtype == getattr(torch, dtype)
    assert seen == [logits.dtype]
    for name, p in run.model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        assert not torch.equal(p, before[name]), name
    moments = [v for s in run.optimizer.state.values() for v in s.values()]
    assert len(moments) == 3 * len(before)
    assert all(v.dtype == torch.float32 for v in moments)
    assert run.scaler.is_enabled() == (dtype == "float16")


def test_the_scaler_of_float16_skips_a_step_that_overflows(tmp_path, texts):
    run = Run(tiny(tmp_path, dtype="float16"))
    steps(run)
    before, scale = parameters(run), run.scaler.get_scale()
    hook = run.model.lm_head.weight.register_hook(lambda grad: torch.full_like(grad, float("inf")))
    steps(run)
    hook.remove()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    assert run.scaler.get_scale() == scale / 2
    again = Run(tiny(tmp_path, dtype="float16"))
    again.load_state(run.state())
    assert again.scaler.get_scale() == scale / 2


def test_one_step_is_adamw_by_hand(tmp_path, texts):
    """p (1 - lr wd) - lr g / (|g| + eps) at the first step: decay for matrices alone, g clipped."""
    config = tiny(tmp_path, lr=0.01, weight_decay=0.5, clip=0.125)
    run = Run(config)
    before = parameters(run)
    _, norm = steps(run)
    grads = {name: p.grad for name, p in run.model.named_parameters()}
    total = torch.stack([g.double().norm() for g in grads.values()]).norm()
    assert norm > 0.5
    want = 0.125 * norm.double() / (norm.double() + 1e-6)
    check("norm after clipping", total, want, bound(want.float(), total.float()))
    for name, p in run.model.named_parameters():
        decays = p.dim() >= 2 and not name.endswith("A_log")
        old, g = before[name].double(), grads[name].double()
        want = old * (1 - 0.01 * 0.5 * decays) - 0.01 * g / (g.abs() + 1e-8)
        plain = before[name] * (1 - 0.01 * 0.5 * decays) - 0.01 * grads[name] / (grads[name].abs() + 1e-8)
        check(name, p, want, bound(plain, want))


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """Two batches of 4 are a batch of 8, where every row has one label."""
    grads = {}
    for dtype in (torch.float32, torch.float64):
        for batch, pieces in ((8, 1), (2, 4)):
            config = tiny(tmp_path, task="copying", batch_size=batch, accumulate=pieces, clip=0, lr=0)
            run = Run(config)
            run.model.to(dtype)
            rows = Run(tiny(tmp_path, task="copying", batch_size=8)).data
            rows.seek(0)
            whole = rows.next()
            run.data.next = iter_pieces(whole, batch)
            run.begin_step()
            run.advance()
            grads[dtype, pieces] = torch.cat([p.grad.flatten() for p in run.model.parameters()])
    exact, plain = grads[torch.float64, 1], grads[torch.float32, 1]
    assert exact.abs().max() > 0
    check("accumulated", grads[torch.float32, 4], exact, bound(plain, exact))


def iter_pieces(whole, batch):
    firsts = iter(range(0, len(whole.labels), batch))

    def following():
        first = next(firsts)
        part = slice(first, first + batch)
        return whole._replace(input_ids=whole.input_ids[part], labels=whole.labels[part])

    return following


def test_gradient_checkpointing_changes_no_bit(tmp_path, texts):
    plain, again = (Run(tiny(tmp_path, gradient_checkpointing=v)) for v in (False, True))
    assert again.objective.options["gradient_checkpointing"]
    assert steps(plain, 2) == steps(again, 2)
    for a, b in zip(plain.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("task", ["text", "copying"])
def test_ranks_share_the_rows_of_a_step(tmp_path, texts, task):
    settings = {"task": task, "batch_size": 2, "accumulate": 2}
    ranks = [Run(tiny(tmp_path, **settings), processes=Processes(r, 3)) for r in range(3)]
    rows = []
    for run in ranks:
        run.step = 1
        run.begin_step()
        rows += [run.data.next().input_ids for _ in range(2)]
    rows = torch.cat(rows)
    assert len(rows) == ranks[0].rows_per_step == 12
    if task == "text":  # those that one process would have taken
        one = Run(tiny(tmp_path, batch_size=12))
        one.step = 1
        one.begin_step()
        assert torch.equal(one.data.next().input_ids, rows)
    assert len(torch.unique(rows, dim=0)) == 12


def test_a_run_leaves_metrics_a_curve_and_a_model(tmp_path, texts):
    config = tiny(tmp_path, log_every=2, eval_every=3, warmup=4, steps=7)
    result = train(config)
    lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 7]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6, 7]
    assert [line["lr"] for line in lines] == pytest.approx([0.005, 0.0075, 0.01, 0.01, 0.01])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["tokens_per_s"] > 0 for line in lines)
    assert (result.out / "curve.png").read_bytes().startswith(b"\x89PNG")
    model = MambaLMHeadModel.from_pretrained(result.out / "model")
    for a, b in zip(model.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert result.step == 7


def test_the_tokenizers_file_stands_beside_the_model(tmp_path, texts):
    tokenizers, transformers = (pytest.importorskip(name) for name in ("tokenizers", "transformers"))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"scan": 0, "?": 1, "gate": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    data = {"folder": str(tmp_path / "texts"), "tokenizer": str(tmp_path / "words.json")}
    result = train(tiny(tmp_path, data=data, steps=1, seqlen=8))
    found = transformers.AutoTokenizer.from_pretrained(result.out / "model")
    assert found("gate scan").input_ids == [2, 0]


def test_a_hook_adds_to_the_metrics_and_ends_the_run(tmp_path):
    def hook(run, line):
        line["longer"] = run.step * 2
        return run.step == 4

    config = tiny(tmp_path, task="induction", eval_every=2, steps=50)
    result = train(config, hooks=[hook])
    assert result.step == 4
    assert [line.get("longer") for line in read_metrics(result.out / "metrics.jsonl")] == [None, 4, None, 8]
    assert train(config).step == 4  # it has ended, and is not taken up again


def test_a_run_that_a_hook_ended_goes_on_when_the_hooks_want_more(tmp_path):
    """As one whose time was over, given more time: to the bit the run that was never ended."""
    config = tiny(tmp_path, task="induction", eval_every=2, steps=50)
    asked = []

    def until(step):
        return lambda run, line: asked.append((run.step, line["step"])) or run.step >= step

    for step, reached in ((4, 4), (4, 4), (8, 8)):
        result = train(config, hooks=[until(step)])
        assert result.step == reached
    assert asked == [(2, 2), (4, 4), (4, 4), (4, 4), (6, 6), (8, 8)]
    at_once = train(replace(config, out=str(tmp_path / "other")), hooks=[until(8)])
    for a, b in zip(result.model.parameters(), at_once.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [untimed(line) for line in result.metrics] == [untimed(line) for line in at_once.metrics]


def test_evaluation_counts_the_labels_that_count(tmp_path):
    run = Run(tiny(tmp_path, task="copying", dtype="bfloat16"))
    batches = list(run.data.validation(3))
    found = evaluate(run.objective, batches)
    logits, labels = (torch.cat(v) for v in zip(*map(run.objective.logits, batches), strict=True))
    assert (labels != IGNORED).all()
    want = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten())
    single = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    check("loss", torch.tensor(found["validation_loss"]).double(), want, bound(single, want))
    assert found["validation_accuracy"] == (logits.argmax(-1) == labels).double().mean().item()
    assert evaluate(run.objective, []) == {}


def test_metrics_begin_again_behind_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, 0)
    for step in (1, 2, 3):
        first.add({"step": step, "loss": float("nan") if step == 2 else 0.5})
    with path.open("a") as out:
        out.write('{"step": 4, "lo')  # killed here
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    again = Metrics(path, 2)
    again.add({"step": 3, "loss": 0.25})
    assert (
        path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 0.25}\n'
    )
    assert again.lines == read_metrics(path)
