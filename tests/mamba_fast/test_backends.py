"""Which backend a call takes, what is said about it, and what happens where a library is missing."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import at_precision, device_of
from scan_inputs import scan_inputs

from mamba_fast import available_backends, explain_backend, selective_scan_fn
from mamba_fast.ops.selective_scan import backends
from mamba_fast.ops.selective_scan.arguments import normalise
from mamba_fast.ops.selective_scan.registration import scan

ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
CALL = """
import torch
from mamba_fast import available_backends, explain_backend, selective_scan_fn
torch.manual_seed(0)
u, delta = torch.randn(1, 3, 5), torch.rand(1, 3, 5)
A, B = -torch.rand(3, 2), torch.randn(1, 2, 5)
args = (u, delta, A, B, B)
"""


def in_a_process(code, without=(), environment=ON_CPU):
    """What `code` prints in a fresh interpreter in which the modules `without` cannot be imported."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({tuple(without)!r}))\n"
    command = [sys.executable, "-c", blocked + CALL + textwrap.dedent(code)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def on_cpu():
    return at_precision(scan_inputs(1), torch.float32)


@pytest.mark.numba
def test_the_choice_names_the_backend_the_reason_and_every_other():
    choice = explain_backend(**on_cpu())
    assert choice.name == "numba"
    assert set(choice.others) == set(backends.NAMES) - {"numba"}
    lines = str(choice).splitlines()
    assert lines[0] == "numba: real input on a CPU, and numba is installed"
    assert sorted(line.split(":")[0] for line in lines[1:]) == ["  not cuda", "  not torch", "  not triton"]
    assert all(len(line.split(": ", 1)[1]) > 10 for line in lines)


def test_float64_and_complex_run_on_torch_and_the_reason_is_given():
    wide = explain_backend(**scan_inputs(1))
    curled = explain_backend(**at_precision(scan_inputs(1, complex_A=True), torch.float32))
    empty = explain_backend(**at_precision(scan_inputs(1, seqlen=0), torch.float32))
    for choice in (wide, curled, empty):
        assert choice.name == "torch"
        assert choice.reason == "plain PyTorch takes every device and type"
    reasons = {"numba": (wide, curled, empty)} if "numba" in available_backends("cpu") else {}
    if backends.interpreted():
        reasons["triton"] = (wide, curled, empty)
    for name, choices in reasons.items():
        said = [choice.others[name] for choice in choices]
        assert said == [
            "its state is float32, and u is float64",
            "complex A runs on the torch backend alone",
            "there is nothing to scan",
        ]


def test_a_backend_asked_for_by_name_is_taken(backend, device):
    inputs = at_precision(scan_inputs(1), torch.float32, device)
    choice = explain_backend(**inputs, backend=backend)
    assert str(choice).startswith(f"{backend}: asked for by name\n")
    assert set(choice.others.values()) == {"another backend was asked for"}
    assert selective_scan_fn(**inputs, backend=backend).shape == inputs["u"].shape


def test_the_first_available_backend_is_the_one_a_call_takes():
    names = available_backends("cpu")
    assert names[0] == explain_backend(**on_cpu()).name
    assert "torch" in names
    assert len(set(names)) == len(names)
    assert set(names) <= set(backends.NAMES)
    for name in names:
        assert selective_scan_fn(**on_cpu(), backend=name).isfinite().all()
    for name in set(backends.NAMES) - set(names):
        with pytest.raises(ValueError, match=f"backend: '{name}' cannot take this call"):
            selective_scan_fn(**on_cpu(), backend=name)


def test_a_gpu_is_asked_for_without_one_being_touched():
    assert "numba" not in available_backends("cuda")


@pytest.mark.gpu
@pytest.mark.triton
def test_the_cuda_kernels_come_first_on_a_gpu():
    choice = explain_backend(**at_precision(scan_inputs(1), torch.float32, "cuda"))
    assert (choice.name, available_backends()[0]) == ("cuda", "cuda")
    assert choice.others["numba"].startswith("it runs on a CPU, and u is on cuda")


MISSING = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            y = selective_scan_fn(*args)
        selective_scan_fn(*args, backend="torch")
        selective_scan_fn(*(a.double() for a in args))
    print(len(caught), y.isfinite().all().item())
    for w in caught:
        print(w.filename, w.message)
    print(explain_backend(*args))
    print(available_backends())
"""


def test_one_warning_names_the_missing_extra():
    out, _ = in_a_process(MISSING, without=["numba"])
    count, warning, *rest = out.splitlines()
    assert count == "1 True"
    assert warning.startswith("<string> ")  # it points at the caller's line
    assert "pip install 'mamba-fast[cpu]'" in warning
    assert "runs on the torch backend" in warning
    assert rest[0] == "torch: plain PyTorch takes every device and type"
    assert "  not numba: numba is not installed (extra 'cpu')" in rest
    assert rest[-1] == "['torch']"


@pytest.mark.numba
def test_no_warning_when_nothing_is_missing():
    out, err = in_a_process(MISSING)
    assert out.splitlines()[0] == "0 True"
    assert err == ""


def test_no_warning_about_what_this_call_could_not_use():
    code = """
        import warnings
        warnings.simplefilter("error")
        selective_scan_fn(*(a.double() for a in args))
        selective_scan_fn(*args, backend="torch")
        selective_scan_fn(u[:, :, :0], delta[:, :, :0], A, B[:, :, :0], B[:, :, :0])
    """
    in_a_process(code, without=["numba", "triton"])


def test_without_triton_and_numba_the_torch_backend_runs():
    code = """
        import mamba_fast
        u.requires_grad_()
        y, last_state = selective_scan_fn(*args, return_last_state=True, backend="torch")
        (y.sum() + last_state.sum()).backward()
        print(y.shape, u.grad.isfinite().all().item(), mamba_fast.available_backends())
        for name in ("numba", "triton"):
            try:
                selective_scan_fn(*args, backend=name)
            except ValueError as error:
                print(error)
    """
    out, err = in_a_process(code, without=["numba", "llvmlite", "triton"])
    assert out.splitlines() == [
        "torch.Size([1, 3, 5]) True ['torch']",
        "backend: 'numba' cannot take this call: numba is not installed (extra 'cpu')",
        "backend: 'triton' cannot take this call: triton is not installed (extra 'triton')",
    ]
    assert err == ""


def test_importing_the_package_imports_neither_triton_nor_numba():
    out, _ = in_a_process("print([name for name in ('triton', 'numba') if name in sys.modules])")
    assert out == "[]\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fused", [pytest.param(b, marks=getattr(pytest.mark, b)) for b in ("numba", "triton", "cuda")]
)
def test_the_operator_keeps_the_strides_that_it_promises_to_the_compiler(fused, dtype):
    """Of a channel-last input: torch.compile plans memory from what the fake operator says."""
    device = device_of(fused)
    inputs = at_precision(scan_inputs(2, 2, 3, 9, 2), dtype, device)
    for name in ("u", "delta", "z", "B", "C"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    softplus, state = inputs.pop("delta_softplus"), inputs.pop("initial_state")
    args = normalise(*inputs.values(), softplus, state, None, None)
    args = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    torch.library.opcheck(
        scan, (*args, False, True, fused), test_utils=["test_faketensor", "test_aot_dispatch_dynamic"]
    )


@pytest.mark.parametrize(
    "name", ["torch", *(pytest.param(b, marks=getattr(pytest.mark, b)) for b in ("numba", "triton", "cuda"))]
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch's own making
def test_a_compiled_call_has_no_graph_break(name):
    """torch.compile(fullgraph=True) refuses any; outputs and gradients are those of the eager call."""
    inputs = at_precision(scan_inputs(3, 1, 3, 9, 2), torch.float32, device_of(name))
    leaves = [v.requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor)]

    def model():
        y, last_state = selective_scan_fn(**inputs, return_last_state=True, backend=name)
        return y.sin().sum() + last_state.sum()

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = [compiled(), *torch.autograd.grad(compiled(), leaves)]
    want = [model(), *torch.autograd.grad(model(), leaves)]
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packing", [{"seq_idx": [[0] * 5 + [1] * 4]}, {"cu_seqlens": [0, 5, 9]}])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_call_of_packed_rows_has_no_graph_break(packing):
    inputs = at_precision(scan_inputs(3, 1, 3, 9, 2, initial_state=False), torch.float32, "cpu")
    packing = {name: torch.tensor(v) for name, v in packing.items()}

    def model(**given):
        return selective_scan_fn(**inputs, **given, backend="torch")

    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**packing)
    assert torch.allclose(got, model(**packing), rtol=1e-5, atol=1e-6)
