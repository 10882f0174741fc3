"""`bench model`: the block on a CPU, and whole models, here on a CPU and at a size for it."""

import json
import sys
import types

import pytest
import torch

from mamba_fast import MambaConfig, MambaLMHeadModel
from mamba_fast.bench import __main__ as bench
from mamba_fast.bench import checks, generation_models, model, model_block, rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(generation_models.MAMBA, "tiny", (16, 2))
    monkeypatch.setitem(generation_models.VOCAB, "mamba", 50)
    monkeypatch.setattr(model, "FORWARD", {"tiny forward": ("tiny", 2, 9)})
    monkeypatch.setattr(model, "STEP", {"tiny step": ("tiny", 2, 9)})
    monkeypatch.setattr(model, "CHECKED", (2, 9))
    monkeypatch.setattr(model_block, "SHAPES", {"tiny block": (1, 9, 32)})
    monkeypatch.setattr(rows, "in_turn", lambda calls, device, right=rows.in_turn: right(calls, device, 3, 1))


@pytest.fixture
def published(monkeypatch):
    """The published package's names, with ours behind them."""
    package = ("mamba_ssm", "mamba_ssm.models.mixer_seq_simple", "mamba_ssm.models.config_mamba")
    for name in (*package, "causal_conv1d_cuda", "selective_scan_cuda"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    class Published(MambaLMHeadModel):
        def forward(self, input_ids):
            return super().forward(input_ids)

    sys.modules["mamba_ssm.models.mixer_seq_simple"].MambaLMHeadModel = Published
    sys.modules["mamba_ssm.models.config_mamba"].MambaConfig = MambaConfig


def test_the_block_on_a_cpu(tmp_path, capsys):
    """Every rival that is installed agrees and is timed; ratios refer to the faster one."""
    out = tmp_path / "result.json"
    bench.main(["model", "--device", "cpu", "--out", str(out)])
    result, printed = json.loads(out.read_text("utf-8")), capsys.readouterr().out
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    assert names[0] == "ours"
    assert len(result["rows"]) == 2 * len(names)
    for row in result["rows"]:
        assert 0 < row["time"]["p10"] <= row["time"]["median"] <= row["time"]["p90"]
        assert row["tokens_per_s"] == pytest.approx(9e3 / row["time"]["median"], rel=1e-2)
        assert any(row["case"] in line and row["name"] in line for line in printed.splitlines())
    assert len(result["findings"]) == (2 if len(names) > 1 else 0)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_every_rival_of_the_block_is_checked():
    (case,) = model_block.cases(CPU)
    found = checks.check(case)
    assert all(error < 1e-4 for errors in found.values() for error in errors.values())
    assert all(len(errors) == 11 for errors in found.values())  # y, dx, and 9 weights


def test_whole_models_are_checked_and_take_turns(published):
    forward, step = (
        model._case(n, "tiny", CPU, True, n == "tiny forward") for n in ("tiny forward", "tiny step")
    )
    assert set(checks.check(forward)) == {"ours", "published"}
    found = checks.check(step)
    assert set(found) == {"ours", "ours, all logits", "published"}
    assert {"loss", "dbackbone.embedding.weight", "dbackbone.layers.1.mixer.A_log"} <= set(found["ours"])
    got = model.whole_models(CPU, True)
    assert [(r["case"], r["name"], r["role"]) for r in got] == [
        ("tiny forward", "ours", "ours"), ("tiny forward", "published", "peer"),
        ("tiny step", "ours", "ours"), ("tiny step", "ours, all logits", "ours"),
        ("tiny step", "published", "peer"),
    ]  # fmt: skip
    assert [line.split(":")[0] for line in model.findings(got)] == [
        "tiny forward, ours", "tiny step, ours", "tiny step, ours, all logits",
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_each_call_is_also_replayed_as_one_graph(capsys):
    got = model.whole_models(torch.device("cuda"), False)
    cases = ["tiny forward", "tiny forward, one graph", *["tiny step"] * 2, *["tiny step, one graph"] * 2]
    assert [row["case"] for row in got] == cases
    assert ["peak_bytes" in row for row in got] == [True, False, True, True, False, False]
    assert capsys.readouterr().err.count("not captured") == 0


def test_all_competitors_share_their_weights(published):
    modules = model.competitors("tiny", CPU, torch.float32, True)
    first, *others = [dict(module.model.named_parameters()) for module in modules.values()]
    for other in others:
        assert {k: v.data_ptr() for k, v in other.items()} == {k: v.data_ptr() for k, v in first.items()}
    ids = model.tokens_of((2, 9), CPU, 1)
    losses = [module(ids).item() for module in modules.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_wrong_loss_is_refused(monkeypatch):
    right = MambaLMHeadModel.loss
    monkeypatch.setattr(MambaLMHeadModel, "loss", lambda self, ids, **k: 1.1 * right(self, ids, **k))
    with pytest.raises(checks.CheckFailed, match="tiny step bfloat16, ours, loss: error"):
        checks.check(model._case("tiny step", "tiny", CPU, False, False))


def test_ratios_refer_to_the_fastest_peer():
    def row(name, role, median, peak):
        time = {"median": median, "p10": median, "p90": median}
        return {"case": "step", "name": name, "role": role, "time": time, "peak_bytes": peak}

    found = [row("ours", "ours", 2.0, 5), row("slow", "peer", 9.0, 10), row("fast", "peer", 5.0, 20)]
    assert rows.findings(found) == ["step, ours: 2.50x the speed of fast, 0.25x its peak memory"]
