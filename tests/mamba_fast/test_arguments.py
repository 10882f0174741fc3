"""What the fused scan refuses: the message names the argument, says what came and what is accepted."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import at_precision, device_of
from scan_inputs import scan_inputs

from mamba_fast import explain_backend, selective_scan_fn

BATCH, D_INNER, SEQLEN, D_STATE = 2, 6, 5, 3
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def arguments(**changes):
    return at_precision(scan_inputs(1, BATCH, D_INNER, SEQLEN, D_STATE), torch.float32) | changes


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def refuse(error, name, came, accepted, **changes):
    """All three parts stand in the message, and it begins with the argument's name."""
    with pytest.raises(error) as caught:
        selective_scan_fn(**arguments(**changes))
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    assert came in message, message
    assert accepted in message, message


def test_the_arguments_themselves_are_accepted():
    assert selective_scan_fn(**arguments()).shape == (BATCH, D_INNER, SEQLEN)


@pytest.mark.parametrize("value, came", [([1.0], "list"), (np.ones(3), "ndarray"), (1.0, "float")])
@pytest.mark.parametrize("name", [*TENSORS, "seq_idx", "cu_seqlens"])
def test_not_a_tensor(name, value, came):
    refuse(TypeError, name, f"got {came}", "expected a torch.Tensor", **{name: value})


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C"])
def test_a_tensor_that_is_missing(name):
    refuse(TypeError, name, "got NoneType", "expected a torch.Tensor", **{name: None})


@pytest.mark.parametrize(
    "name, shape, accepted",
    [
        ("u", (6, 5), "(B, D, L)"),
        ("u", (2, 6, 5, 1), "(B, D, L)"),
        ("delta", (2, 6, 4), "(2, 6, 5)"),
        ("delta", (2, 5, 6), "(2, 6, 5)"),
        ("A", (3, 6), "(6, N)"),
        ("A", (6,), "(6, N)"),
        ("B", (2, 4, 5), "(2, 3, 5) or (2, G, 3, 5), with N = 3 from A"),
        ("B", (1, 3, 5), "(2, 3, 5) or (2, G, 3, 5)"),
        ("B", (2, 2, 3, 4), "(2, 3, 5) or (2, G, 3, 5)"),
        ("B", (3, 6), "(6, 3)"),
        ("B", (5,), "(D, N) = (6, 3), (B, N, L) or (B, G, N, L)"),
        ("C", (2, 3, 10), "(2, 3, 5) or (2, G, 3, 5)"),
        ("C", (1, 2, 3, 5, 1), "(D, N) = (6, 3), (B, N, L) or (B, G, N, L)"),
        ("D", (6, 1), "(6)"),
        ("D", (5,), "(6)"),
        ("z", (2, 6, 1), "(2, 6, 5)"),
        ("delta_bias", (1,), "(6)"),
        ("initial_state", (1, 6, 3), "(2, 6, 3)"),
        ("initial_state", (2, 3, 6), "(2, 6, 3)"),
    ],
)
def test_a_wrong_shape(name, shape, accepted):
    refuse(ValueError, name, f"got {shape}", accepted, **{name: ones(*shape)})


@pytest.mark.parametrize("name", ["B", "C"])
@pytest.mark.parametrize("groups", [4, 0])
def test_groups_that_do_not_divide_the_channels(name, groups):
    accepted = f"must divide D = {D_INNER}"
    refuse(ValueError, name, f"got G = {groups}", accepted, **{name: ones(BATCH, groups, D_STATE, SEQLEN)})


FLOATS = "float32, float16, bfloat16 or float64"


@pytest.mark.parametrize(
    "name, dtype, accepted",
    [
        ("u", torch.int32, FLOATS),
        ("u", torch.complex64, FLOATS),
        ("delta", torch.float16, "expected float32"),
        ("A", torch.float16, "expected float32 or complex64"),
        ("A", torch.float64, "expected float32 or complex64"),
        ("B", torch.bfloat16, "expected float32"),
        ("C", torch.float64, "expected float32"),
        ("D", torch.bfloat16, "expected float32"),
        ("z", torch.float64, "expected float32"),
        ("delta_bias", torch.float16, "expected float32"),
        ("initial_state", torch.int64, "expected float32 or float64 or float16 or bfloat16"),
    ],
)
def test_a_wrong_type(name, dtype, accepted):
    came = str(dtype).removeprefix("torch.")
    refuse(TypeError, name, came, accepted, **{name: arguments()[name].to(dtype)})


def test_a_constant_matrix_has_the_type_of_A():
    refuse(TypeError, "B", "got float16", "expected float32", B=ones(D_INNER, D_STATE, dtype=torch.float16))
    complex_A = -ones(D_INNER, D_STATE, dtype=torch.complex64)
    refuse(TypeError, "C", "got float32", "expected complex64", A=complex_A, B=complex_A, initial_state=None,
           C=ones(D_INNER, D_STATE))  # fmt: skip


def test_a_complex_A_needs_pairs_in_B_and_C_and_a_complex_state():
    complex_A = -ones(D_INNER, D_STATE, dtype=torch.complex64)
    refuse(ValueError, "B", "got (2, 3, 5)", "(2, 3, 10) or (2, G, 3, 10)", A=complex_A, initial_state=None)
    pairs = ones(BATCH, D_STATE, 2 * SEQLEN)
    refuse(TypeError, "initial_state", "got float32", "expected complex64", A=complex_A, B=pairs, C=pairs)


@pytest.mark.parametrize("name", [*TENSORS[1:], "seq_idx"])
def test_a_wrong_device(name):
    wrong = arguments(seq_idx=torch.zeros(BATCH, SEQLEN, dtype=torch.int64))[name].to("meta")
    refuse(ValueError, name, "got meta", "expected device cpu (that of u)", **{name: wrong})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16])
def test_seq_idx_of_a_wrong_type(dtype):
    refuse(TypeError, "seq_idx", str(dtype)[6:], "expected int32 or int64",
           seq_idx=ones(BATCH, SEQLEN, dtype=dtype))  # fmt: skip


def test_seq_idx_of_a_wrong_shape():
    refuse(ValueError, "seq_idx", "got (5,)", "(2, 5)", seq_idx=torch.zeros(SEQLEN, dtype=torch.int64))


def one_row(**changes):
    """The arguments of a batch of one, as packing by cumulative lengths needs them."""
    inputs = at_precision(scan_inputs(1, 1, D_INNER, SEQLEN, D_STATE, initial_state=False), torch.float32)
    return inputs | changes


@pytest.mark.parametrize(
    "edges", [[0, 3], [1, 5], [0, 4, 2, 5], [0, 6, 5], [0, -1, 5], [0, 6], [5, 0], [2, 2]]
)
def test_cu_seqlens_that_do_not_rise_from_0_to_L(edges):
    accepted = f"expected to rise from 0 to L = {SEQLEN}"
    refuse(ValueError, "cu_seqlens", f"got {edges}", accepted, **one_row(cu_seqlens=torch.tensor(edges)))


@pytest.mark.parametrize(
    "cu_seqlens, came",
    [
        (torch.tensor([0.0, 5.0]), "torch.float32"),
        (torch.tensor([[0, 5]]), "(1, 2)"),
        (torch.tensor([0]), "(1,)"),
        (torch.tensor([], dtype=torch.int32), "(0,)"),
        (torch.tensor(5), "()"),
    ],
)
def test_cu_seqlens_of_a_wrong_type_or_shape(cu_seqlens, came):
    accepted = "expected int32 or int64 of shape (S + 1,), S >= 1"
    refuse(ValueError, "cu_seqlens", came, accepted, **one_row(cu_seqlens=cu_seqlens))


def test_cu_seqlens_on_a_batch_of_two():
    refuse(ValueError, "cu_seqlens", "got a batch of 2", "needs a batch of 1",
           cu_seqlens=torch.tensor([0, 2, 5]))  # fmt: skip


def test_a_state_for_each_sequence_of_cu_seqlens():
    refuse(ValueError, "initial_state", "got (1, 6, 3)", "(2, 6, 3)",
           **one_row(cu_seqlens=torch.tensor([0, 2, 5]), initial_state=ones(1, 6, 3)))  # fmt: skip


def test_both_packings_at_once():
    packings = {"cu_seqlens": torch.tensor([0, 5]), "seq_idx": torch.zeros(1, 5, dtype=torch.int64)}
    refuse(ValueError, "seq_idx and cu_seqlens", "got both", "give one of them", **one_row(**packings))


@pytest.mark.parametrize("backend", ["CUDA", "Torch", "", 1])
def test_an_unknown_backend(backend):
    refuse(
        ValueError,
        "backend",
        f"got {backend!r}",
        "None or one of torch, numba, triton, cuda",
        backend=backend,
    )


FUSED = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("numba", "triton", "cuda")]


@pytest.mark.parametrize("fused", FUSED)
def test_a_fused_backend_asked_to_take_float64(fused):
    inputs = scan_inputs(1, BATCH, D_INNER, SEQLEN, D_STATE)
    accepted = "its state is float32, and u is float64"
    refuse(ValueError, "backend", f"{fused!r} cannot take this call", accepted,
           **at_precision(inputs, torch.float64, device_of(fused)), backend=fused)  # fmt: skip


@pytest.mark.parametrize("fused", FUSED)
def test_a_fused_backend_asked_to_take_a_complex_A(fused):
    inputs = scan_inputs(1, BATCH, D_INNER, SEQLEN, D_STATE, complex_A=True)
    refuse(ValueError, "backend", f"{fused!r} cannot take this call", "complex A runs on the torch backend",
           **at_precision(inputs, torch.float32, device_of(fused)), backend=fused)  # fmt: skip


@pytest.mark.numba
def test_numba_asked_to_take_another_device_than_the_cpu():
    elsewhere = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    refuse(ValueError, "backend", "u is on meta", "it runs on a CPU", **elsewhere, backend="numba")


@pytest.mark.triton
def test_triton_without_a_gpu_or_its_interpreter():
    """In a process of its own: this one may have set TRITON_INTERPRET."""
    code = """
import torch
from mamba_fast import selective_scan_fn
x = torch.ones(1, 2, 3)
try:
    selective_scan_fn(x, x, -torch.ones(2, 1), x[:, :1], x[:, :1], backend="triton")
except ValueError as error:
    print(error)
"""
    hidden = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | hidden
    )
    assert run.stdout.startswith("backend: 'triton' cannot take this call: "), run.stdout + run.stderr
    assert "it needs a GPU (or TRITON_INTERPRET=1)" in run.stdout
    assert "u is on cpu" in run.stdout


def test_explain_backend_refuses_what_the_call_refuses():
    with pytest.raises(ValueError, match=r"^backend: expected None or one of .* got 'CUDA'"):
        explain_backend(ones(1, 2, 3), backend="CUDA")
