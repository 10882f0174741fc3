"""The benches check, time, print a table, write a result and its figure; a failed check writes nothing."""

import functools
import json

import pytest
import torch

import mamba_fast
from mamba_fast.bench import __main__ as bench
from mamba_fast.bench import (
    attention,
    checks,
    conv,
    inner,
    norm,
    peers,
    scan,
    scan_grid,
    scan_options,
    timing,
    update,
)
from mamba_fast.bench.case import Case, Kernel, View
from mamba_fast.bench.measure import rotating, times

CPU = torch.device("cpu")
TINY = {
    scan: {"CPU_CASES": {"tiny": (2, 9, 33, 4)}},
    scan_grid: {"CPU_GRID": ((1,), (9,), (33, 65)), "CPU_LENGTHS": [32, 64], "LENGTH_SHAPE": (1, 9)},
    scan_options: {"CPU_CASES": {"tiny": (2, 9, 33, 4), "tiny row": (1, 9, 33, 4)}},
    attention: {"CPU_LENGTHS": [32, 64], "HEADS": 2, "WIDTH": 16},
    conv: {"CPU_CASES": {"tiny": (2, 9, 33)}, "CPU_UPDATES": [(2, 9)]},
    update: {"CPU_CASES": {"tiny": (2, 0, 9, 4), "tiny heads": (2, 3, 5, 4)}},
    norm: {"CPU_CASES": {"tiny RMS": (9, 33), "tiny LayerNorm": (9, 33)}},
    inner: {"CPU_CASES": {"tiny": (2, 16, 33)}},
}
ROW = {"case", "shape", "dtype", "name", "role", "forward"}
SCANNED = "y du ddelta dA dB dC dD dz ddelta_bias"
RUNS = {  # the tensors that each compares with the truth
    "scan": SCANNED,
    "scan --grid": SCANNED,
    "scan --options": SCANNED,
    "attention": "y",
    "conv": "y dx dweight dbias",
    "update": "y state",
    "norm": "y residual dx dresidual dweight",
    "inner": "y dxz",  # of the timed problem; all gradients of the same problem at batch 1
}


def plain_inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
    D=None, delta_bias=None,
):  # fmt: skip
    assert out_proj_bias is None
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight)
    return inner.op_by_op(xz, *weights, A, D, delta_bias, backend="torch")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Problems of a few numbers, few repeats, and nothing that has to be compiled first."""
    for module, values in TINY.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    loop = Kernel("loop in PyTorch", scan.loop, "other")
    monkeypatch.setattr(scan, "rivals", lambda device: [loop] if device.type == "cpu" else [])

    def few(work, *_, right=timing.wall_ms, **wait):
        return right(work, 3, 1, **wait)

    monkeypatch.setattr(timing, "wall_ms", few)
    if not hasattr(mamba_fast, "mamba_inner_fn"):
        monkeypatch.setattr(mamba_fast, "mamba_inner_fn", plain_inner, raising=False)


def result_of(arguments, tmp_path):
    out = tmp_path / "result.json"
    bench.main([*arguments.split(), "--device", "cpu", "--out", str(out)])
    return json.loads(out.read_text("utf-8"))


@pytest.mark.parametrize("arguments", RUNS)
def test_a_bench_writes_a_result_and_its_figure(arguments, tmp_path, capsys):
    result = result_of(arguments, tmp_path)
    assert result["bench"] == arguments.replace(" --", "-")
    assert result["checks"] == "passed"
    assert {"device", "date", "torch", "python", "commit", "triton", "numba", "mamba_ssm"} <= set(result)
    assert result["copy_bytes_per_s"] > 1e8
    for row in result["rows"]:
        assert set(row) >= ROW, row
        for kind in ("forward", "backward"):
            if kind in row:
                assert 0 < row[kind]["p10"] <= row[kind]["median"] <= row[kind]["p90"]
                assert row["name"].startswith("SDPA") or row[f"{kind}_limit"] > 0
        assert row["role"] != "ours" or all(0 <= e < 1e-4 for e in row["errors"].values())
    ours = [row for row in result["rows"] if row["role"] == "ours" and "step" not in row["case"]]
    assert ours
    assert all(set(RUNS[arguments].split()) <= set(row["errors"]) for row in ours)
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "checks passed" in printed
    for row in result["rows"]:
        assert any(row["case"] in line and row["name"] in line for line in printed.splitlines())


def test_a_failed_check_writes_nothing(tmp_path, monkeypatch, capsys):
    right = scan.ours(CPU)[0].run
    wrong = [Kernel("wrong", lambda **tensors: 1.0001 * right(**tensors))]
    monkeypatch.setattr(scan, "ours", lambda device, backend: wrong)
    with pytest.raises(SystemExit) as stopped:
        result_of("scan", tmp_path)
    assert stopped.value.code.startswith("tiny float32, wrong, y: error 1.0e-04 is above the bound")
    assert stopped.value.code.endswith("nothing is written")  # a text as exit status: stderr, and status 1
    assert list(tmp_path.iterdir()) == []
    assert "tiny" not in capsys.readouterr().out


def case_with(run, dtype=torch.float32, **options):
    return scan.scan_case("tiny", (2, 9, 33, 4), dtype, CPU, [Kernel("mine", run)], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_a_wrong_gradient_is_refused(name, dtype):
    factor = 1e-3 if dtype == torch.float32 or name in scan.FLOAT32 else 0.3

    def run(**tensors):
        x = tensors[name]
        tensors[name] = x + factor * (
            x - x.detach()
        )  # the same value; its gradient is 1 + factor times as large
        return scan.selective_scan_fn(**tensors, delta_softplus=True, backend="torch")

    with pytest.raises(checks.CheckFailed, match=f"mine, d{name}: error"):
        checks.check(case_with(run, dtype))


def test_a_result_that_is_no_number_is_refused():
    def run(**tensors):
        return torch.nan * scan.selective_scan_fn(**tensors, backend="torch")

    with pytest.raises(checks.CheckFailed, match="mine, y: error nan"):
        checks.check(case_with(run))


def test_an_error_of_the_published_kernel_is_measured_but_not_judged():
    right = scan.ours(CPU)[0]
    wrong = Kernel("published", lambda **tensors: 1.5 * right.run(**tensors), "peer")
    found = checks.check(scan.scan_case("tiny", (2, 9, 33, 4), torch.float32, CPU, [right, wrong]))
    assert found["published"]["y"] == pytest.approx(0.5, rel=1e-5)
    assert found["published"]["dB"] == pytest.approx(0.5, rel=1e-5)
    assert max(found[right.name].values()) < 1e-5


def test_parts_of_the_scan_are_compared_with_the_same_parts_of_the_truth():
    case = scan.scan_case("long", (2, 20, 70, 4), torch.float32, CPU, scan.ours(CPU))
    whole = Case("whole", case.shape, case.dtype, case.make, case.kernels, case.plain, views=(View(),))
    tensors = case.make(1)
    weights = [torch.randn(2, 20, 70)]
    truth, _ = checks._truth(case, tensors, weights)
    full, _ = checks._truth(whole, tensors, weights)
    assert set(truth) == set(full)
    for name, part in truth.items():
        want = checks._cut(case, name, full[name])
        torch.testing.assert_close(part, want, rtol=1e-6, atol=1e-9)  # of float64: only dy was rounded
        assert part.numel() < full[name].numel(), name


def test_a_long_sum_term_after_term_is_within_its_bound_and_a_hundredth_of_a_percent_is_not():
    def summed(x, w, wrong=0.0):
        class Sequential(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, w):
                ctx.save_for_backward(x)
                return x * w

            @staticmethod
            def backward(ctx, dy):
                (x,) = ctx.saved_tensors
                return dy * w, (1 + wrong) * (dy * x).cumsum(0)[-1:]  # one accumulator, row after row

        return Sequential.apply(x, w)

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.randn(r, 8, generator=generator) for n, r in (("x", 20000), ("w", 1))}

    for wrong in (0.0, 1e-4):
        kernel = Kernel("mine", functools.partial(summed, wrong=wrong))
        case = Case("sum", (20000, 8), torch.float32, make, [kernel], lambda x, w: x * w)
        if wrong:
            with pytest.raises(checks.CheckFailed, match="mine, dw: error"):
                checks.check(case)
        else:
            assert checks.check(case)["mine"]["dw"] < 1e-5


def test_backward_times_the_backward_alone():
    calls = {"forward": 0, "backward": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls["forward"] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            calls["backward"] += 1
            return dy

    def make(seed):
        return {"x": torch.randn(3), "count": torch.arange(3)}

    kernel = Kernel("mine", lambda x, count: Counted.apply(x))
    case = Case("tiny", (3,), torch.float32, make, [kernel], lambda x, count: x, thorough=False)
    found = times(case, kernel, rotating(case, CPU), CPU)
    assert set(found) == {"forward", "backward"}
    assert calls["backward"] >= 4  # one to warm up, three timed
    assert calls["forward"] == calls["backward"] + 1  # the forward as often, and once for all backwards


def test_the_scan_is_timed_on_the_published_shapes():
    found = {(c.shape, c.dtype) for c in scan.cases(torch.device("cuda"), False)}
    half, single = torch.bfloat16, torch.float32
    first = ((8, 1536, 2048), (4, 4096, 2048), (1, 5120, 8192), (1, 5120, 2048))
    others = ((1, 1536, 65536), (1, 1536, 524288), (2, 256, 512))
    assert found == {
        *(((*shape, 16), half) for shape in first + others),
        *(((*shape, 16), single) for shape in first),
        *(((8, 1536, 2048, d_state), half) for d_state in (8, 32, 64)),
    }


def test_what_cannot_be_imported_is_said_and_left_out(monkeypatch, capsys):
    gpu = torch.device("cuda")
    monkeypatch.setitem(peers.sys.modules, "mamba_ssm", None)
    monkeypatch.setitem(peers.sys.modules, "selective_scan_cuda", None)
    assert peers.peers("scan", gpu, True) == []
    assert "published selective_scan_fn: not timed" in capsys.readouterr().err
    assert peers.peers("scan", gpu, False) == peers.peers("scan", CPU, True) == []
    monkeypatch.setitem(
        peers.PUBLISHED, "scan", ("json", "mamba_fast.ops.selective_scan", "selective_scan_fn")
    )
    (kernel,) = peers.peers("scan", gpu, True)
    assert (kernel.name, kernel.role, kernel.run) == ("published", "peer", mamba_fast.selective_scan_fn)


@pytest.mark.parametrize("kind", ["grid", "options"])
def test_only_the_scan_has_several_benches(capsys, kind):
    with pytest.raises(SystemExit):
        bench.main(["conv", f"--{kind}"])
    assert f"--{kind}: of scan alone, got conv" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", RUNS)
def test_a_bench_runs_on_a_gpu(arguments, tmp_path, monkeypatch):
    for module, values in TINY.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name.replace("CPU", "GPU"), value)
    monkeypatch.setattr(scan, "IN_FLOAT32", ("tiny",))
    out = tmp_path / "result.json"
    bench.main([*arguments.split(), "--device", "cuda", "--out", str(out)])
    result = json.loads(out.read_text("utf-8"))
    assert result["exponentials_per_s"] > 1e11
    assert all(row["forward"]["median"] < 1 for row in result["rows"] if row["role"] == "ours")
