"""Selective copying by growing lengths: what a run takes over from stage to stage, and what it says of it."""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba_fast import MambaConfig
from mamba_fast.bench import readme
from mamba_fast.reproduce import copying
from mamba_fast.reproduce.__main__ import main
from mamba_fast.reproduce.partly import ALL, partly_selective_model
from mamba_fast.train import load_config, selective_copying

RESULTS = Path(__file__).parents[2] / "docs" / "results"
GROWING = copying.TABLE_1 | {
    "stages": ((12, 2), (24, 3)), "data.n_tokens": 4, "model.d_model": 16, "batch_size": 4, "eval_every": 1,
    "warmup": 1, "dtype": "float32",
}  # fmt: skip


def options(folder):
    return Namespace(device=torch.device("cpu"), work=folder)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def stages(monkeypatch):
    """What each call of `train` got and left: config, parameters before, parameters behind."""
    seen, train = [], copying.train

    def watched(config, model, hooks):
        before = parameters(model).clone()
        result = train(config, model=model, hooks=hooks)
        seen.append((config, before, parameters(result.model).clone()))
        return result

    monkeypatch.setattr(copying, "train", watched)
    return seen


def test_a_stage_starts_with_the_parameters_of_the_one_before(tmp_path, stages, monkeypatch):
    tested = []
    right = lambda model, config: tested.append((parameters(model), config.seqlen)) or torch.ones(2, 4)  # noqa: E731
    monkeypatch.setattr(copying, "correct", right)
    copying.trained(options(tmp_path), GROWING, ALL, 3, 1)
    (_, start, between), (_, taken_up, end) = stages
    torch.manual_seed(3)
    fresh = partly_selective_model(MambaConfig(vocab_size=16, d_model=16, n_layer=2), ALL)
    assert torch.equal(start, parameters(fresh))
    assert torch.equal(taken_up, between)
    assert not torch.equal(between, start)
    assert not torch.equal(end, between)
    ((found, length),) = tested
    assert torch.equal(found, end)
    assert length == 24


def test_selective_or_not_the_schedule_is_the_same(tmp_path, stages):
    for selective in (ALL, ()):
        copying.trained(options(tmp_path), GROWING, selective, 0, 1)
    plans = [asdict(config) for config, *_ in stages]
    folders = [plan.pop("out") for plan in plans]
    assert plans[:2] == plans[2:]
    assert [(plan["seqlen"], plan["steps"]) for plan in plans[:2]] == [(12, 2), (24, 3)]
    assert len({plan["seed"] for plan in plans[:2]}) == 2
    assert len(set(folders)) == 4


def test_table_1_ends_at_the_papers_shape(tmp_path):
    *shorter, last = copying.settings(options(tmp_path), copying.TABLE_1, ALL, 0)
    assert (last.seqlen, last.batch_size, last.data.get("n_tokens", 16)) == (4096, 64, 16)
    assert last.model == {"d_model": 64, "n_layer": 2}
    assert [c.seqlen for c in shorter] == sorted({c.seqlen for c in shorter})
    assert all(c.seqlen < last.seqlen and c.lr_at(c.steps) == last.lr_at(last.steps) == 1e-4 for c in shorter)


def test_the_page_has_the_stages_of_the_command():
    text = (RESULTS.parent / "reproduce.md").read_text("utf-8")
    lengths, steps = zip(*copying.TABLE_1["stages"], strict=True)
    table = ["length", *map(str, lengths)], ["steps at most", *(f"{n:,}" for n in steps)]
    assert readme.markdown(table[0], table[1:]) in text


def test_rows_and_curve_say_the_stages(tmp_path):
    row, curve = copying.trained(options(tmp_path), GROWING, (), 0, 1)
    assert (row["task"], row["stages"], row["steps"]) == ("4 of 24", [[12, 2], [24, 3]], 5)
    assert row["paper"] is None
    assert 0 < row["minutes"] < 1
    assert [(c["length"], c["step"]) for c in curve] == [(12, 1), (12, 2), (24, 3), (24, 4), (24, 5)]
    assert all(0 <= c["tokens"] <= 100 and c["task"] == row["task"] for c in curve)
    first, second = copying.findings([row | {"tokens": 7.0}])
    assert first.endswith("a number a seed: none (LTI): 7.0")
    assert second.endswith(": none (LTI): 2 at 12 + 3 at 24")
    assert "| 12, 2; 24, 3 |" in readme.table([row])
    assert len(copying.findings([row | {"stages": [[24, 5]]}])) == 1


def test_a_long_curve_keeps_the_end_of_each_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "SHOWN", 2)
    _, curve = copying.trained(options(tmp_path), GROWING | {"stages": ((12, 4), (24, 3))}, (), 0, 1)
    assert [(c["length"], c["step"]) for c in curve] == [(12, 2), (12, 4), (24, 5), (24, 7)]


def test_a_stage_but_the_last_ends_when_it_is_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "DONE", 0.0)
    row, _ = copying.trained(options(tmp_path), GROWING, ALL, 0, 1)
    assert row["stages"] == [[12, 1], [24, 3]]


def test_the_minutes_are_those_of_all_stages(tmp_path, stages, monkeypatch):
    row, curve = copying.trained(options(tmp_path / "none"), GROWING, ALL, 0, 0)
    assert row["stages"] == [[12, 1]]
    assert row["task"] == "4 of 24"
    assert [c["length"] for c in curve] == [12]
    watched = copying.train
    slow = lambda *args, **more: watched(*args, **more)._replace(seconds=30.0)  # noqa: E731
    monkeypatch.setattr(copying, "train", slow)
    row, _ = copying.trained(options(tmp_path / "one"), GROWING, ALL, 0, 0.5 + 1e-6)
    assert row["stages"] == [[12, 2], [24, 1]]


def test_a_run_that_was_killed_goes_on_with_its_stage(tmp_path, stages, monkeypatch):
    whole, curve = copying.trained(options(tmp_path / "whole"), GROWING, ALL, 0, 1)
    watched = copying.train

    def killed(config, model, hooks):
        if config.seqlen == 24:
            raise KeyboardInterrupt
        return watched(config, model=model, hooks=hooks)

    monkeypatch.setattr(copying, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        copying.trained(options(tmp_path / "cut"), GROWING, ALL, 0, 1)
    monkeypatch.setattr(copying, "train", watched)
    again = copying.trained(options(tmp_path / "cut"), GROWING, ALL, 0, 1)
    assert again[0] | {"minutes": 0} == whole | {"minutes": 0}
    assert again[1] == curve
    assert torch.equal(stages[-1][-1], stages[1][-1])


def test_the_figure_marks_where_a_stage_starts(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    row, curve = copying.trained(options(tmp_path), GROWING, ALL, 0, 1)
    fig = copying.figure(plt, {"rows": [row], "curves": curve, "chance": copying.CHANCE})
    marks = [(t.get_position()[0], t.get_text()) for t in fig.axes[1].texts]
    assert marks == [(1, "12 "), (3, "24 ")]
    lines = [list(line.get_xdata()) for line in fig.axes[1].lines if len(line.get_xdata()) > 2]
    assert lines == [[3, 4, 5]]
    assert "length of the stage" in fig.axes[1].get_title()
    plt.close(fig)


@pytest.mark.parametrize("name", ["copying", "copying-quick"])
def test_the_committed_results_can_be_drawn_again(name):
    plt = pytest.importorskip("matplotlib.pyplot")
    result = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    fig = copying.figure(plt, result)
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    assert [ax.get_title().split(" tokens")[0] for ax in fig.axes[::2]] == tasks
    plt.close(fig)


def test_the_copying_test_counts_tokens():
    """A model that has the answer is right everywhere, one that says noise nowhere."""
    config = load_config("copying", {"device": "cpu", "graph": False, "seqlen": 20, "batch_size": 3})

    class Oracle:
        def __call__(self, ids, num_last_tokens):
            data = torch.stack([row[:20][row[:20] > 0] for row in ids])
            return Namespace(logits=torch.nn.functional.one_hot(data, 16).float())

    class Noise:
        def __call__(self, ids, num_last_tokens):
            logits = torch.zeros(*ids[:, -num_last_tokens:].shape, 16)
            logits[..., 0] = 1
            return Namespace(logits=logits)

    assert copying.correct(Oracle(), config, 2).tolist() == np.ones((6, 16)).tolist()
    assert copying.correct(Noise(), config, 2).tolist() == np.zeros((6, 16)).tolist()
    assert selective_copying(3, 20).last == 16


def test_copying_runs_all_subsets(tmp_path, monkeypatch):
    few = {"stages": ((32, 3),), "batch_size": 4, "eval_batches": 2}
    monkeypatch.setattr(copying, "QUICK", copying.QUICK | few)
    main(["copying", "--quick", "--device", "cpu", "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    found = json.loads((tmp_path / "copying-quick.json").read_text("utf-8"))
    assert len({row["selective"] for row in found["rows"]}) == 8
    assert all(row["sequences"] <= row["tokens"] for row in found["rows"])
    assert all(row["stages"] == [[32, 3]] for row in found["rows"])
    assert [line.split(" tokens")[0] for line in found["findings"]] == ["4 of 32"]
