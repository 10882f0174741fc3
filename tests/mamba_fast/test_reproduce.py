"""The commands that measure the paper's results: at a small size on a CPU, and what they committed."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba_fast import MambaConfig, MambaLMHeadModel
from mamba_fast.bench import readme
from mamba_fast.bench.figure import source
from mamba_fast.reproduce import copying, counts, figure8, induction, precision, report
from mamba_fast.reproduce.__main__ import NAMES, main, page
from mamba_fast.reproduce.partly import ALL, partly_selective_model

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TABLE_9 = [358.9, 359.1, 359.3, 359.7, 360.5, 362.1, 365.2, 371.5]
TABLE_10 = [367.1, 367.4, 368.0, 369.1, 371.5]
FEW = {"steps": 3, "batch_size": 4, "eval_batches": 2}  # that a command runs, not what comes out of it
SIZES = {"d_model": 16, "n_layer": 2, "vocab_size": 16}


def committed():
    return [p for p in sorted(RESULTS.glob("*.json")) if p.stem.removesuffix("-quick") in NAMES]


def test_all_counts_of_tables_9_and_10_are_the_papers():
    (found,) = counts.run(None)
    rows = found["rows"]
    found = {t: [round(r["parameters"] / 1e6, 1) for r in rows if r["table"] == t] for t in ("9", "10")}
    assert found["9"] == TABLE_9
    assert found["10"][::2] == TABLE_10  # B and C selective
    assert found["10"][1::2] == TABLE_10  # B and C constant
    assert [r["ours"] for r in rows if r["table"] == "11"] == ["74K"]
    assert json.loads((RESULTS / "counts.json").read_text("utf-8"))["rows"] == json.loads(json.dumps(rows))
    whole = counts.ablation(("delta",), 64, 8, n_layer=48)
    assert sum(p.numel() for p in whole.parameters()) == rows[-6]["parameters"]


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_committed_figures_are_drawn_from_the_committed_numbers(path):
    result = json.loads(path.read_text("utf-8"))
    assert source(result).encode() in path.with_suffix(".png").read_bytes()
    assert result["device"]
    assert result["date"]


def naive_block(mixer, x):
    """The block by loops, one token after another, with what is constant taken from the parameters."""
    xz = x @ mixer.in_proj.weight.T
    inner, z = xz.chunk(2, dim=-1)  # (L, D)
    padded = torch.cat([inner.new_zeros(mixer.d_conv - 1, mixer.d_inner), inner])
    taps = mixer.conv1d.weight[:, 0].T
    h, out = x.new_zeros(mixer.d_inner, mixer.d_state), []
    for t in range(len(x)):
        u = torch.nn.functional.silu((padded[t : t + mixer.d_conv] * taps).sum(0) + mixer.conv1d.bias)
        parts = {}
        if mixer.x_proj is not None:
            found = (mixer.x_proj.weight @ u).split(list(mixer.rows.values()))
            parts = dict(zip(mixer.rows, found, strict=True))
        raw = mixer.dt_proj.weight @ parts["delta"] if "delta" in parts else 0
        delta = torch.nn.functional.softplus(raw + mixer.dt_proj.bias)
        B = parts["B"] if "B" in parts else mixer.B
        C = parts["C"] if "C" in parts else mixer.C
        h = torch.exp(-delta[:, None] * mixer.A_log.exp()) * h + (delta * u)[:, None] * B
        y = (h * C).sum(-1) + mixer.D * u
        out.append(mixer.out_proj.weight @ (y * torch.nn.functional.silu(z[t])))
    return torch.stack(out)


@pytest.mark.parametrize("selective", copying.subsets(), ids=lambda names: "-".join(names) or "none")
def test_a_partly_selective_block_is_the_recurrence(selective):
    torch.manual_seed(len(selective))
    model = partly_selective_model(MambaConfig(**SIZES), selective)
    ids = torch.randint(16, (1, 9))
    seen = {}
    for layer in model.backbone.layers:
        layer.mixer.register_forward_hook(lambda mixer, args, out: seen.update({mixer: (args[0], out)}))
    model(ids, backend="torch").logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for mixer, (hidden, out) in seen.items():
        want = naive_block(mixer.double(), hidden[0].detach().double())
        error = (out[0].double() - want).norm() / want.norm()
        assert error < 32 * torch.finfo(torch.float32).eps


def test_all_selective_is_the_mamba_block():
    torch.manual_seed(0)
    theirs = MambaLMHeadModel(MambaConfig(**SIZES))
    ours = partly_selective_model(MambaConfig(**SIZES), ALL)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(16, (2, 20))
    got, want = (model(ids, backend="torch").logits for model in (ours, theirs))
    assert (got - want).norm() / want.norm() < 32 * torch.finfo(torch.float32).eps


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match=r"selective: .*'A'"):
        partly_selective_model(MambaConfig(**SIZES), ("A",))


def test_states_are_carried_from_piece_to_piece(monkeypatch):
    """Accuracy of an untrained model is the same in one piece and in many: every answer is."""
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(**SIZES)).double()
    found = []
    for tokens in (2**15, 40, 12):
        monkeypatch.setitem(induction.TOKENS, "cpu", tokens)
        found.append(induction.accuracy(model, 100, 1, 3))
    assert len(set(found)) == 1
    whole, logits = torch.randint(16, (2, 50)), []
    for size in (50, 7):
        states = None
        for piece in whole.split(size, dim=1):
            out = model(piece, num_last_tokens=1, initial_states=states, return_final_states=True)
            states = out.final_states
        logits.append(out.logits)
    assert torch.allclose(*logits, rtol=1e-9)


def test_a_long_convolution_is_the_sum():
    u, kernel = torch.randn(1, 2, 13), torch.randn(1, 2, 13)
    want = [[[sum(kernel[0, d, s] * u[0, d, t - s] for s in range(t + 1)) for t in range(13)]
             for d in range(2)]]  # fmt: skip
    assert torch.allclose(figure8.long_convolution(u, kernel), torch.tensor(want), atol=1e-5)


def quick(name, folder, *flags):
    at = ["--device", "cpu", "--out", str(folder), "--work", str(folder / "work")]
    main([name, "--quick", *at, *flags])
    return json.loads((folder / f"{name}-quick.json").read_text("utf-8"))


def test_induction_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(induction, "QUICK", induction.QUICK | FEW)
    monkeypatch.setattr(induction, "rows_at", lambda seqlen, quick: 2)
    found = quick("induction", tmp_path, "--seeds", "0")
    assert [row["length"] for row in found["rows"]] == [2**k for k in range(5, 14)]
    assert all(0 <= row["seed 0"] <= 100 for row in found["rows"])
    assert found["runs"][0]["steps"] == FEW["steps"]
    assert "1 seeds: 100 %" in capsys.readouterr().out
    assert (tmp_path / "induction-quick.png").stat().st_size > 10_000


def test_figure8_times_every_way(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(figure8.attention, "CPU_LENGTHS", [32, 64])
    found = quick("figure8", tmp_path, "--batch", "1")
    assert [row["length"] for row in found["rows"]] == [32, 64]
    for row in found["rows"]:
        assert {"FFT convolution", "unfused scan"} < row.keys()
        assert any(way.startswith("scan, ") for way in row)
        assert all(ms > 0 for ms in row.values())
    assert [row["model"] for row in found["throughput"]] == list(figure8.QUICK.values())
    assert found["findings"][-1].startswith("batch 1: ")


def test_precision_finds_what_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "QUICK", precision.QUICK | {"batch_size": 2, "seqlen": 16, "steps": 25})
    rows = {row["parameters"]: row for row in quick("precision", tmp_path)["rows"]}
    for name in ("float32", "float32, AMP bfloat16", "float32, AMP float16"):
        assert rows[name]["finite"]
        assert rows[name]["A_log stuck"] < 50
        assert rows[name]["horizon rounded"] == 0
    assert rows["bfloat16"]["A_log stuck"] > 80
    assert 0.5 < rows["bfloat16"]["horizon rounded"] < 5  # Δ's bias is up to 2^-9 of 7 wrong: 1.4 %, and A
    assert rows["float16"]["horizon rounded"] < rows["bfloat16"]["horizon rounded"] / 4


def test_horizons_are_compared_as_products():
    exact = {"A_log": [torch.zeros(2, 1)], "dt_proj.bias": [torch.tensor([0.0, 1.0])]}
    near = {"A_log": [torch.tensor([[0.0], [0.1]])], "dt_proj.bias": [torch.tensor([0.0, 1.0])]}
    assert precision.horizon_error(exact, near) == pytest.approx(np.expm1(0.1), rel=1e-6)


def test_an_installed_package_writes_to_where_it_is_called(tmp_path):
    copy = tmp_path / "mamba_fast" / "reproduce" / "report.py"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(Path(report.__file__).read_bytes())
    assert runpy.run_path(str(copy))["RESULTS"] == Path("docs", "results")
    assert report.RESULTS == RESULTS


def test_memory_needs_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="memory: needs an NVIDIA GPU, got device 'cpu'"):
            main(["memory"])


def test_the_page_is_written_from_the_results(tmp_path):
    document, results = tmp_path / "page.md", tmp_path / "results"
    results.mkdir()
    path = results / "counts.json"
    path.write_bytes((RESULTS / "counts.json").read_bytes())
    document.write_text("<!-- counts -->\nold\n<!-- /counts -->\n")
    page(results, document)
    assert "| 9 | Δ of rank 64 | 371500032 | 371.5M | 371.5M |" in document.read_text("utf-8")
    assert source(json.loads(path.read_text("utf-8"))).encode() in path.with_suffix(".png").read_bytes()


def test_lengths_are_short():
    assert [report.short(n) for n in (64, 1024, 2**15, 2**20)] == ["64", "1k", "32k", "1M"]


def test_the_committed_page_has_the_committed_numbers(tmp_path):
    text = (RESULTS.parent / "reproduce.md").read_text("utf-8")
    document = tmp_path / "page.md"
    document.write_text(text, "utf-8")
    assert set(readme.rewrite(document, RESULTS)) <= {path.stem for path in committed()}
    assert document.read_text("utf-8") == text


def test_the_script_writes_the_weights_of_notebook_09(tmp_path, monkeypatch):
    """It runs, and what is committed has the switch that the notebook looks for."""
    monkeypatch.setattr(induction, "QUICK", induction.QUICK | FEW)
    weights = RESULTS.parents[1] / "notebooks" / "weights"
    runpy.run_path(str(weights / "train_09.py"))["main"]("1", tmp_path)
    new, kept = (MambaLMHeadModel.from_pretrained(p) for p in (tmp_path, weights / "09_induction"))
    assert new.config == kept.config
    assert induction.accuracy(new, 64, 32, 1) < 0.5
    assert induction.accuracy(kept, 64, 32, 1) == 1
    assert induction.accuracy(kept, 1024, 8, 1) == 1
