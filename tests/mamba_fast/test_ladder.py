"""Every rung of the ladder: right, complete, as small as its header says, and a real kernel for real GPUs."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scan_inputs import in_numpy, scan_inputs

from mamba_fast import ladder
from mamba_ref.checks import bound, errors
from mamba_ref.selective_scan import selective_scan, selective_scan_numpy

triton = pytest.importorskip("triton", reason="the ladder's kernels need Triton")
tl = pytest.importorskip("triton.language")
softplus = pytest.importorskip("mamba_fast.ladder.common").softplus
pytestmark = pytest.mark.triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="only Triton's interpreter can be watched")
EX2 = 2.0**-22  # relative error of the exponential instruction of NVIDIA GPUs (ex2.approx)

SHAPES = [  # batch, d_inner, seqlen, d_state
    (1, 1, 1, 1),
    (2, 3, 2, 5),
    (1, 9, 31, 3),
    (1, 5, 63, 3),
    (1, 3, 64, 17),
    (2, 5, 65, 2),
    (1, 10, 100, 6),
]
OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "initial_state")


@pytest.fixture(params=ladder.RUNGS)
def rung(request, monkeypatch):
    """A rung with tiles of 32 steps, so that short sequences already cross their edges."""
    module = getattr(ladder, request.param)
    if hasattr(module, "BLOCK_L"):
        monkeypatch.setattr(module, "BLOCK_L", 32)
    return module


def on_device(inputs, dtype=torch.float32):
    """Half types hold u, delta, B, C, z only; A, D, delta_bias and the state stay float32."""
    half = ("u", "delta", "B", "C", "z")
    return {
        k: v.to(DEVICE, dtype if k in half else torch.float32) if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }


def assert_right(function, inputs):
    """y and last_state against the oracle on the same (rounded) inputs; K times plain PyTorch's error."""
    exact = {k: v.cpu().double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    want = selective_scan_numpy(**in_numpy(exact), return_last_state=True)
    plain = selective_scan(**inputs, return_last_state=True)
    got = function(**inputs, return_last_state=True)
    for name, g, w, p in zip(("y", "last_state"), got, want, plain, strict=True):
        assert g.dtype == p.dtype
        allowed = bound(p, w)
        if DEVICE == "cuda":
            allowed += inputs["u"].shape[-1] * EX2  # a state is a product of up to seqlen exponentials
        relative = errors(g, w)[1]
        assert relative <= allowed, f"{name}: relative error {relative:.2e} is above the bound {allowed:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(rung, shape):
    assert_right(rung.selective_scan, on_device(scan_inputs(sum(shape), *shape)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(rung, dtype):
    assert_right(rung.selective_scan, on_device(scan_inputs(2, 2, 5, 37, 3), dtype))


@pytest.mark.parametrize("only", [None, *OPTIONS])
def test_every_option_alone(rung, only):
    options = {name: name == only for name in OPTIONS}
    assert_right(rung.selective_scan, on_device(scan_inputs(7, 2, 5, 35, 3, **options)))


@pytest.mark.parametrize("shift", [-12, 100])
def test_steps_far_from_zero(rung, shift):
    """softplus there: a Δ near 6e-6, which decides the state, and one that e^Δ could not hold."""
    inputs = on_device(scan_inputs(13, 1, 3, 34, 2, initial_state=False))
    inputs["delta"] += shift
    assert_right(rung.selective_scan, inputs)


@pytest.mark.parametrize("name", [n for n in ladder.RUNGS if n not in ("k1", "k2")])
def test_tiles_as_they_are_on_a_gpu(name):
    """One step past the first tile of the size that the file sets."""
    module = getattr(ladder, name)
    assert_right(module.selective_scan, on_device(scan_inputs(3, 1, 3, module.BLOCK_L + 1, 2)))


def test_inputs_that_are_not_contiguous(rung):
    inputs = on_device(scan_inputs(5, 2, 3, 34, 4))
    strided = dict(inputs)
    for name in ("u", "delta", "A", "B", "C", "z", "initial_state"):
        strided[name] = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(rung.selective_scan(**strided), rung.selective_scan(**inputs), rtol=0, atol=0)


def test_state_passes_from_one_call_to_the_next(rung):
    """h_t depends on the past through h alone: the second half from the first half's state is the whole."""
    inputs = on_device(scan_inputs(11, 1, 5, 70, 3))
    whole = selective_scan(**inputs, return_last_state=True)
    exact = {k: v.cpu().double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    want = selective_scan_numpy(**in_numpy(exact), return_last_state=True)
    first = {k: v[..., :33] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    second = {k: v[..., 33:] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    given = inputs["initial_state"].clone()
    y_1, h = rung.selective_scan(**first, return_last_state=True)
    assert torch.equal(inputs["initial_state"], given)  # the caller's state is not written to
    y_2, h = rung.selective_scan(**(second | {"initial_state": h}), return_last_state=True)
    extra = 70 * EX2 if DEVICE == "cuda" else 0
    assert errors(torch.cat([y_1, y_2], -1), want[0])[1] <= bound(whole[0], want[0]) + extra
    assert errors(h, want[1])[1] <= bound(whole[1], want[1]) + extra


@pytest.mark.parametrize("batch, d_inner, seqlen", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(rung, batch, d_inner, seqlen):
    inputs = on_device(scan_inputs(1, batch, d_inner, seqlen, 3))
    y, h = rung.selective_scan(**inputs, return_last_state=True)
    assert y.shape == (batch, d_inner, seqlen)
    assert torch.equal(h, inputs["initial_state"]) if seqlen == 0 else h.numel() == 0


@triton.jit
def softplus_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, softplus(tl.load(x_ptr + offs)))


def test_softplus_keeps_its_digits_far_from_zero():
    """Every single value, not the norm: log(1 + e^x) written plainly is wrong in the third digit at -10.

    Rounding the argument of the exponential costs |x| roundings, the rest of the formula fewer than 8.
    """
    x = torch.cat([torch.linspace(-80, 80, 1023), torch.tensor([0.0])]).to(DEVICE)
    got = torch.empty_like(x)
    softplus_kernel[(1,)](x, got, BLOCK=1024)
    exact = x.cpu().double()
    want = exact.clamp(min=0) + torch.log1p(torch.exp(-exact.abs()))
    unit = torch.finfo(torch.float32).eps / 2
    hardware = EX2 if DEVICE == "cuda" else 0
    assert ((got.cpu().double() - want).abs() <= want * ((8 + exact.abs()) * unit + hardware)).all()


def test_softplus_at_the_ends():
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), -1e4], device=DEVICE)
    got = torch.empty_like(x)
    softplus_kernel[(1,)](x, got, BLOCK=4)
    assert torch.equal(got.cpu().nan_to_num(nan=-1.0, posinf=1.0), torch.tensor([1.0, 0.0, -1.0, 0.0]))


WRONG = {
    "u": (3, 5), "delta": (2, 3, 4), "A": (4, 2), "B": (2, 3, 5), "C": (2, 2, 4), "D": (1,), "z": (2, 5, 3),
    "delta_bias": (3, 1), "initial_state": (2, 2, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_shape_is_named(rung, name):
    inputs = on_device(scan_inputs(1, 2, 3, 5, 2))
    with pytest.raises(ValueError, match=rf"^{name}: got shape .* expected \("):
        rung.selective_scan(**(inputs | {name: torch.ones(WRONG[name], device=DEVICE)}))


def test_a_wrong_type_is_named(rung):
    inputs = on_device(scan_inputs(1, 1, 2, 3, 2))
    with pytest.raises(TypeError, match=r"^B: got torch\.float64"):
        rung.selective_scan(**(inputs | {"B": inputs["B"].double()}))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 11, 37, 3)])
def test_bytes_moved_is_what_moves(rung, shape, dtype):
    """The prediction of each header, exactly: every load and store of every program is counted."""
    from mamba_fast.ladder.trace import trace

    inputs = on_device(scan_inputs(1, *shape, initial_state=False), dtype)
    with trace() as log:
        rung.selective_scan(**inputs)
    log.passes = [p for p in log.passes if not p.name.startswith("fill_")]  # the poison of conftest.py
    batch, d_inner, seqlen, d_state = shape
    assert log.bytes == rung.bytes_moved(batch, seqlen, d_inner, d_state, dtype.itemsize)


@needs_interpreter
def test_every_output_is_written_once_and_nothing_else_is_touched(rung):
    from mamba_fast.ladder.trace import trace

    with trace() as log:
        rung.selective_scan(**on_device(scan_inputs(1, 2, 11, 37, 3)))
    writes = np.zeros(2 * 11 * 37, int)
    for access in log.accesses:
        if access.write and access.tensor == "y":
            writes[access.index] += 1
    assert (writes == 1).all()
    assert log.outside == 0


@needs_interpreter
def test_trace_sees_an_access_outside():
    from mamba_fast.ladder.trace import trace

    x = torch.zeros(8)
    with trace() as log:
        softplus_kernel[(1,)](x[:3], x[4:], BLOCK=4)
    assert log.outside == 1  # the fourth element of the first argument


def test_files_stay_small_and_share_one_signature():
    want = list(inspect.signature(selective_scan).parameters.values())
    want = [(p.name, p.default, p.kind) for p in want if p.name not in ("seq_idx", "cu_seqlens")]
    for name in ladder.RUNGS:
        module = getattr(ladder, name)
        got = inspect.signature(module.selective_scan).parameters.values()
        assert [(p.name, p.default, p.kind) for p in got] == want
        assert len(Path(module.__file__).read_text().splitlines()) <= 80


def test_kernels_compile_for_real_gpus_and_keep_the_state_in_registers():
    """Ahead of time, without a GPU; a spill would put numbers that a header places in registers into HBM."""
    command = [sys.executable, "-m", "mamba_fast.ladder.compiled", "80", "90", "100"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    seen = {(r["rung"], r["kernel"], r["outputs"], r["arch"]) for r in rows}
    kernels = [("k1", "scan_kernel", None), ("k2", "scan_kernel", None), ("k3", "scan_kernel", None)]
    kernels += [("k4", "chunk_kernel", False), ("k4", "carry_kernel", None), ("k4", "chunk_kernel", True)]
    assert seen == {(*kernel, arch) for kernel in kernels for arch in (80, 90, 100)}
    assert all(r["spilled"] == 0 for r in rows), rows
    loops = [r["loop"] for r in rows if r["rung"] == "k3"]
    updates = ladder.k3.BLOCK_D * ladder.k3.BLOCK_L // (32 * ladder.k3.NUM_WARPS)  # of a thread, for one n
    assert [loop["exponentials"] for loop in loops] == [updates] * 3
    assert all(r["loop"] is None for r in rows if r["kernel"] == "carry_kernel")


def test_the_package_imports_without_triton_and_says_what_is_missing():
    code = """
        import sys
        sys.modules["triton"] = None
        from mamba_fast import ladder
        for name, path in ladder.RUNGS.items():
            for statement in (f"from mamba_fast.ladder import {name}", f"import {path}"):
                try:
                    exec(statement)
                except ImportError as error:
                    assert "mamba-fast[triton]" in str(error), error
                else:
                    raise AssertionError(statement + " did not raise")
    """
    run = subprocess.run([sys.executable, "-c", inspect.cleandoc(code)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with pytest.raises(AttributeError, match="k5"):
        _ = ladder.k5
