"""python -m mamba_ref.compare passes what is right, fails every broken function, and says which tensor."""

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mamba_ref import compare, selective_scan
from mamba_ref import compare_measure as measure

TENSORS = ["y", "last_state", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dinitial_state"]
SHAPE = "2,4,9,3"


def loop(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state, backend=None,
    shift=0, keep=lambda delta: delta,
):  # fmt: skip
    """A second scan to break: `shift` takes the decay of another token, `keep` cuts a gradient."""
    delta = F.softplus(delta + delta_bias[:, None])
    A_bar = torch.exp(keep(delta)[..., None] * A[:, None]).roll(shift, 2)  # (B, D, L, N)
    h, ys = initial_state, []
    for t in range(u.shape[-1]):
        h = A_bar[:, :, t] * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    y = (torch.stack(ys, -1) + D[:, None] * u) * F.silu(z)
    return (y, h) if return_last_state else y


def right(*args, **options):
    return loop(*args, **options)


def shifted_decay(*args, **options):
    return loop(*args, **options, shift=1)


def no_ddelta_through_the_decay(*args, **options):
    return loop(*args, **options, keep=lambda delta: delta.detach())


class WrongDdelta(torch.autograd.Function):
    """The scan with a backward that forgets the decay's share of ddelta."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return selective_scan(*tensors[:8], True, True, initial_state=tensors[8])

    @staticmethod
    def backward(ctx, dy, dlast_state):
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = no_ddelta_through_the_decay(*tensors[:8], True, True, initial_state=tensors[8])
        return torch.autograd.grad(out, tensors, (dy, dlast_state))


def wrong_ddelta(*args, initial_state):
    y, last_state = WrongDdelta.apply(*args[:8], initial_state)
    return (y, last_state) if args[9] else y


def state_one_token_early(u, delta, A, B, C, D, z, *rest, initial_state):
    y = selective_scan(u, delta, A, B, C, D, z, *rest, initial_state=initial_state)
    if not rest[2]:
        return y
    shorter = [x[..., :-1] for x in (u, delta)], [x[..., :-1] for x in (B, C)]
    early = selective_scan(*shorter[0], A, *shorter[1], D, z[..., :-1], *rest, initial_state=initial_state)
    return y[0], early[1]


class IgnoreGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return torch.zeros_like(dx)


def deaf_last_state(*args, initial_state):
    out = selective_scan(*args, initial_state=initial_state)
    return (out[0], IgnoreGradient.apply(out[1])) if args[9] else out


def published(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """The published signature: no initial_state, and a last_state whose gradient is ignored."""
    out = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    return (out[0], IgnoreGradient.apply(out[1])) if return_last_state else out


def no_gradient(*args, initial_state):
    with torch.no_grad():
        return selective_scan(*args, initial_state=initial_state)


def forgets_dz(u, delta, A, B, C, D, z, *rest, initial_state):
    return selective_scan(u, delta, A, B, C, D, z.detach(), *rest, initial_state=initial_state)


def wide_output(*args, initial_state):
    out = selective_scan(*args, initial_state=initial_state)
    return (out[0].double(), out[1]) if args[9] else out.double()


def short_output(*args, initial_state):
    out = selective_scan(*args, initial_state=initial_state)
    return (out[0][..., 1:], out[1]) if args[9] else out[..., 1:]


def poisoned(*args, initial_state):
    out = selective_scan(*args, initial_state=initial_state)
    return (out[0].masked_fill(torch.arange(out[0].shape[-1]) == 3, torch.nan), out[1]) if args[9] else out


def ignores_the_start(*args, initial_state):
    return selective_scan(*args)


def almost_right(*args, initial_state):
    y, last_state = selective_scan(*args[:9], True, initial_state=initial_state)
    return (y * (1 + 1e-12), last_state) if args[9] else y


def raises(*args):
    raise RuntimeError("no such kernel")


not_callable = 3.5


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Figures go to a scratch folder, and TRITON_INTERPRET is put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """One repeat where the value of a time does not matter."""
    monkeypatch.setattr(measure, "median_ms", lambda work, device: work() or 1.0)


def run(name, *options, capsys, shape=SHAPE):
    """Exit code, printed text, and {tensor: 'pass' or 'FAIL ...'} of one comparison."""
    code = compare.main([f"{__name__}:{name}", "--device", "cpu", "--shape", shape, *options])
    text = capsys.readouterr().out
    rows = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) > 4 and words[0] in TENSORS:
            rows[words[0]] = " ".join(words[4:])
    return code, text, rows


def failed(rows):
    return [name for name, mark in rows.items() if mark.startswith("FAIL")]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_right_scan_passes_every_row(dtype, capsys, elsewhere):
    name = "right" if dtype in ("float32", "float64") else "right_half"
    code, text, rows = run(name, "--dtype", dtype, capsys=capsys)
    assert list(rows) == TENSORS
    assert set(rows.values()) == {"pass"}
    assert code == 0
    assert "agrees with the reference on all 11 tensors" in text.splitlines()[-1]
    assert (elsewhere / f"out/compare-{name}.png").stat().st_size > 10_000


def right_half(*args, initial_state):
    """As kernels do: half-precision tokens, float32 inside, one rounding of y at the end."""
    wide = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
    y, last_state = loop(*wide[:9], True, initial_state=initial_state)
    return (y.to(args[0].dtype), last_state) if args[9] else y.to(args[0].dtype)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name, wrong", [
    ("shifted_decay", ["y", "last_state", "dA", "ddelta"]),
    ("no_ddelta_through_the_decay", ["ddelta", "ddelta_bias"]),
    ("wrong_ddelta", ["ddelta", "ddelta_bias"]),
    ("state_one_token_early", ["last_state"]),
    ("deaf_last_state", ["du", "dinitial_state"]),
    ("no_gradient", TENSORS[2:]),
    ("forgets_dz", ["dz"]),
    ("wide_output", ["y"]),
    ("short_output", ["y"]),
    ("poisoned", ["y"]),
    ("ignores_the_start", ["y", "last_state", "dinitial_state"]),
])  # fmt: skip
def test_a_broken_scan_fails_and_the_row_says_where(name, wrong, capsys):
    code, text, rows = run(name, capsys=capsys)
    assert code == 1
    assert list(rows) == TENSORS
    assert set(wrong) <= set(failed(rows))
    assert "no times" in text
    assert "does not agree" in text.splitlines()[-1]


def test_rows_that_are_right_pass_beside_a_wrong_one(capsys):
    _, text, rows = run("no_ddelta_through_the_decay", capsys=capsys)
    assert failed(rows) == ["ddelta", "ddelta_bias"]
    _, text, rows = run("wide_output", capsys=capsys)
    assert rows["y"] == "FAIL float64, not float32"
    assert failed(rows) == ["y"]
    _, text, rows = run("forgets_dz", capsys=capsys)
    assert rows["dz"] == "FAIL no gradient"
    assert "dz" in text.splitlines()[-1]


@pytest.mark.usefixtures("quick")
def test_the_float64_bound_sees_an_error_of_1e_12(capsys):
    _, _, rows = run("almost_right", "--dtype", "float64", capsys=capsys)
    assert "y" in failed(rows)


@pytest.mark.usefixtures("quick")
def test_the_published_signature_is_compared_without_its_missing_parts(capsys):
    code, text, rows = run("published", capsys=capsys)
    assert code == 0
    assert list(rows) == TENSORS[:-1]
    assert "gradient through last_state is not compared: the function ignores it" in text


@pytest.mark.usefixtures("quick")
def test_forward_only(capsys):
    code, _, rows = run("no_gradient", "--forward-only", capsys=capsys)
    assert (code, list(rows)) == (0, ["y", "last_state"])
    code, _, rows = run("shifted_decay", "--forward-only", capsys=capsys)
    assert (code, failed(rows)) == (1, ["y", "last_state"])


def test_a_function_that_raises_fails_with_its_message(capsys):
    code, text, _ = run("raises", capsys=capsys)
    assert code == 1
    assert "FAIL  raised RuntimeError: no such kernel" in text


@pytest.mark.parametrize("arguments, message", [
    (["no_such_module:f"], "module 'no_such_module' was not found"),
    (["mamba_ref.no_such_part:f"], "module 'mamba_ref.no_such_part' was not found"),
    (["{here}:no_such_function"], "has no 'no_such_function'"),
    (["{here}:not_callable"], "is a float, not a function"),
    (["mamba_ref"], "MODULE:FUNCTION is needed"),
    (["{here}:published", "--backend", "torch"], "published takes no keyword 'backend'"),
    (["{here}:right", "--shape", "2,4,9"], "four positive sizes B,D,L,N"),
    (["{here}:right", "--shape", "2,4,0,3"], "four positive sizes B,D,L,N"),
    (["{here}:right", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["{here}:right", "--text", "no_such_file"], "--text: [Errno 2]"),
    (["{here}:right", "--device", "cpu", "--text", "README", "--shape", "1,3,4,2"], "needs an even D"),
])  # fmt: skip
def test_usage_errors_exit_2_with_one_line(arguments, message, capsys, elsewhere):
    (elsewhere / "README").write_text("a text")
    with pytest.raises(SystemExit) as exit:
        compare.main([a.format(here=__name__) for a in arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert message.format(here=__name__) in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_a_missing_gpu_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        compare.main([f"{__name__}:right", "--device", "cuda"])
    assert "finds no CUDA GPU" in capsys.readouterr().err


@pytest.fixture
def shop(monkeypatch):
    """A module that offers three backends, one of them broken, and records what it was asked for."""
    module, asked = types.ModuleType("kernel_shop"), []

    def scan(*args, initial_state=None, backend=None):
        asked.append((backend, tuple(args[0].shape)))
        return (shifted_decay if backend == "broken" else right)(*args, initial_state=initial_state)

    module.scan, module.asked, module.available_backends = scan, asked, lambda: ["torch", "triton", "broken"]
    monkeypatch.setitem(sys.modules, "kernel_shop", module)
    return module


@pytest.mark.usefixtures("quick")
def test_every_backend_has_its_section_and_a_broken_one_is_named(shop, capsys, elsewhere):
    assert compare.main(["kernel_shop:scan", "--every-backend", "--device", "cpu", "--forward-only"]) == 1
    text = capsys.readouterr().out
    assert "(broken: y, last_state)" in text.splitlines()[-1]
    assert {backend for backend, _ in shop.asked} == {"torch", "triton", "broken"}
    for name in ("torch", "triton", "broken"):
        assert f"kernel_shop:scan, backend {name}, float32" in text
        assert (elsewhere / f"out/compare-scan-{name}.png").stat().st_size > 10_000


@pytest.mark.usefixtures("quick")
def test_the_interpreter_gets_a_tiny_shape_and_no_times(shop, capsys):
    assert compare.main(["kernel_shop:scan", "--backend", "triton", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert set(shop.asked) == {("triton", compare.TINY[:3])}
    assert "in the Triton interpreter" in text
    assert "no times: the Triton interpreter" in text
    assert "median time" not in text


def test_a_backend_that_is_not_offered_is_a_usage_error(shop, capsys):
    for name, words in (("cuda", "not available on cpu"), ("cudaa", "unknown")):
        with pytest.raises(SystemExit) as exit:
            compare.main(["kernel_shop:scan", "--device", "cpu", "--backend", name])
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert error == f"compare: --backend {name}: {words}; kernel_shop:scan has torch, triton, broken\n"


@pytest.mark.usefixtures("quick")
def test_text_comes_from_a_block_that_reads_the_file(capsys, elsewhere):
    (elsewhere / "Δ.txt").write_text("Δ is the step.\n", encoding="utf-8")
    code, text, rows = run("right", "--text", "Δ.txt", shape="1,6,100,3", capsys=capsys)
    assert (code, list(rows)) == (0, TENSORS)
    assert "B 1, D 6, L 16, N 3: a seeded block reading Δ.txt" in text  # a short file shortens L
    assert (elsewhere / "out/compare-right-Δ.png").exists()
    inputs, read = measure.text_inputs("Δ.txt", (2, 6, 5, 3))
    assert read == ["Δ is".encode(), b" the "]
    assert inputs["u"].shape == (2, 6, 5)
    again, _ = measure.text_inputs("Δ.txt", (2, 6, 5, 3))
    assert torch.equal(inputs["delta"], again["delta"])


@pytest.mark.usefixtures("quick")
def test_the_figure_goes_where_it_is_asked_for(capsys, elsewhere):
    _, text, _ = run("right", "--figure", "deep/here.png", capsys=capsys)
    assert (elsewhere / "deep/here.png").exists()
    assert "deep/here.png" in text.splitlines()[-1]


@pytest.mark.usefixtures("quick")
def test_a_shape_too_large_for_the_truth_is_checked_smaller_and_timed_as_asked(capsys, monkeypatch):
    monkeypatch.setattr(measure, "CHECKED", 2 * 4 * 9 * 3)
    code, text, _ = run("right", shape="3,10,9,3", capsys=capsys)
    assert code == 0
    assert "compared at B 2, D 4, L 9, N 3" in text
    assert "at B 3, D 10, L 9, N 3 the float64 truth would be too large" in text
    assert "ratio   at B 3, D 10, L 9, N 3" in text
    monkeypatch.undo()
    assert compare.checkable((8, 1536, 2048, 16)) == (2, 64, 2048, 16)
    assert compare.checkable(compare.SMALL) == compare.SMALL


def test_median_ms_counts_milliseconds():
    found = measure.median_ms(lambda: time.sleep(0.02), torch.device("cpu"), budget=0.0)
    assert 20 <= found < 200


def test_times_are_the_better_of_one_thread_and_all(monkeypatch):
    monkeypatch.setattr(measure, "median_ms", lambda work, device: float(torch.get_num_threads()))
    inputs = measure.at_precision(measure.random_inputs((1, 2, 3, 2)), torch.float32)
    with measure.threads(2):
        assert measure.times(selective_scan, inputs) == {"forward": 1.0, "forward + backward": 1.0}
        assert torch.get_num_threads() == 2


def test_random_inputs_are_those_of_a_new_block():
    inputs = measure.random_inputs((2, 400, 3, 5))
    steps = F.softplus(inputs["delta_bias"])
    assert 1e-3 <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.1 + 1e-9
    half = measure.at_precision(inputs, torch.bfloat16)
    assert {k for k, v in half.items() if v.dtype == torch.float32} == set(measure.FLOAT32)


def test_the_command_line_ends_with_its_exit_code(elsewhere):
    command = [sys.executable, "-m", "mamba_ref.compare", "mamba_ref.selective_scan:selective_scan"]
    options = ["--device", "cpu", "--figure", str(elsewhere / "here.png"), "--shape"]
    root = Path(compare.__file__).parents[1]
    done = subprocess.run(
        [*command, *options, "1,2,3,2"], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command, *options, "1"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
