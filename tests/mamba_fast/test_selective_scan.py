"""Every backend of the fused scan against the float64 oracle: outputs, last state and every gradient."""

import itertools

import pytest
import torch
from cases import SEQLENS, at_precision, check_agrees, device_of, outcome, weights_of
from scan_inputs import FORMS, in_numpy, scan_inputs

from mamba_fast import selective_scan_fn
from mamba_ref.checks import errors
from mamba_ref.selective_scan import selective_scan_numpy

TINY = {"batch": 2, "d_inner": 5, "d_state": 3}
PACKED = torch.tensor([[0] * 9 + [4] + [2] * 31 + [3] * 29, [1] * 32 + [0] * 38])
CU_SEQLENS = torch.tensor([0, 9, 9, 10, 32, 64, 70])


@pytest.mark.parametrize("seqlen", SEQLENS)
def test_every_length(backend, device, seqlen):
    check_agrees(scan_inputs(seqlen, seqlen=seqlen, **TINY), backend, device=device)


@pytest.mark.parametrize("batch, d_inner, d_state", [(1, 1, 1), (1, 17, 2), (3, 4, 5), (1, 33, 1)])
def test_every_size(backend, device, batch, d_inner, d_state):
    inputs = scan_inputs(d_inner, batch, d_inner, 40, d_state)
    check_agrees(inputs, backend, device=device)


@pytest.mark.parametrize("B, C", list(itertools.product(FORMS, FORMS)))
def test_every_form_of_B_and_C(backend, device, B, C):
    check_agrees(scan_inputs(3, 2, 6, 37, 2, B=B, C=C), backend, device=device)


@pytest.mark.parametrize("present", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("delta_softplus", [True, False])
def test_every_option(backend, device, present, delta_softplus):
    D, z, rest = present
    options = {"D": D, "z": z, "delta_bias": rest, "initial_state": rest, "delta_softplus": delta_softplus}
    check_agrees(scan_inputs(5, 1, 5, 33, 2, **options), backend, device=device)


@pytest.mark.parametrize("initial_state", [True, False])
@pytest.mark.parametrize("d_inner", [5, 17])  # few and many channels a row
def test_packed_rows(backend, device, d_inner, initial_state):
    inputs = scan_inputs(7, 2, d_inner, 70, 2, initial_state=initial_state)
    check_agrees(inputs, backend, device=device, packing={"seq_idx": PACKED})


def test_any_integers_mark_a_packed_row(backend, device):
    inputs = at_precision(scan_inputs(6, 1, 5, 40, 2), torch.float32, device)
    small = torch.tensor([[0] * 20 + [1] * 20], device=device)
    large = torch.where(small == 1, 2**32, 0)  # equal in 32 bits
    got, want = (outcome(selective_scan_fn, inputs, seq_idx=s, backend=backend) for s in (large, small))
    assert torch.equal(got["y"], want["y"])


@pytest.mark.parametrize("initial_state", [True, False])
@pytest.mark.parametrize("d_inner", [5, 17])
def test_packed_by_cumulative_lengths(backend, device, d_inner, initial_state):
    inputs = scan_inputs(8, 1, d_inner, 70, 2, initial_state=False)
    if initial_state:
        inputs["initial_state"] = torch.randn(6, d_inner, 2).double()
    check_agrees(inputs, backend, device=device, packing={"cu_seqlens": CU_SEQLENS})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend, device, dtype):
    check_agrees(scan_inputs(9, 2, 5, 65, 3), backend, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B, C", list(itertools.product(["variable", "constant"], repeat=2)))
def test_complex_A_on_the_torch_backend(dtype, B, C):
    inputs = scan_inputs(10, 2, 4, 33, 3, complex_A=True, B=B, C=C)
    if dtype == torch.float32:
        check_agrees(inputs, "torch")
    else:
        got = outcome(selective_scan_fn, inputs)
        truth = selective_scan_numpy(**in_numpy(inputs), return_last_state=True)
        for tensor, want in zip(got.values(), truth, strict=True):
            assert errors(tensor, want)[1] < 100 * torch.finfo(dtype).eps  # 4 roundings in each of 33 steps


def test_long_sequence_on_the_cpu_backends():
    for backend in ("torch", "numba"):
        pytest.importorskip(backend)
        check_agrees(scan_inputs(11, 1, 3, 1000, 5), backend)


@pytest.mark.numba
def test_numba_is_within_a_millionth_of_the_oracle():
    inputs = at_precision(scan_inputs(12, 2, 64, 500, 16), torch.float32)
    y, last_state = selective_scan_fn(**inputs, return_last_state=True, backend="numba")
    oracle = selective_scan_numpy(**in_numpy(at_precision(inputs, torch.float64)), return_last_state=True)
    assert max(errors(y, oracle[0])[1], errors(last_state, oracle[1])[1]) < 1e-6


LAYOUTS = {
    "channel_last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_give_the_same_result(backend, device, layout):
    """numba: the same bits. A layout may change the order in which PyTorch and a GPU add."""
    allowed = 0 if backend == "numba" else 16 * torch.finfo(torch.float32).eps
    inputs = at_precision(scan_inputs(13, 2, 6, 40, 2), torch.float32, device)
    names = ("u", "delta", "z", "B", "C")
    leaves = [inputs[name].requires_grad_() for name in names]
    found = []
    for relay in (LAYOUTS[layout], lambda x: LAYOUTS[layout](x).contiguous()):
        views = {name: relay(leaf) for name, leaf in zip(names, leaves, strict=True)}
        y = selective_scan_fn(**{**inputs, **views}, backend=backend)
        found.append(
            [y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, 40, device=device).expand_as(y))]
        )
    for name, got, want in zip(("y", *names), *found, strict=True):
        assert errors(got, want)[1] <= allowed, name


def test_nan_stays_in_its_channel(backend, device):
    inputs = at_precision(scan_inputs(14, 2, 5, 40, 2), torch.float32, device)
    clean = outcome(selective_scan_fn, inputs, backend=backend)
    inputs["u"][1, 3, 20] = float("nan")
    dirty = outcome(selective_scan_fn, inputs, backend=backend)
    assert dirty["y"][1, 3, 20:].isnan().all()
    assert dirty["last_state"][1, 3].isnan().all()
    expected = clean["y"].clone()
    expected[1, 3, 20:] = float("nan")
    assert torch.equal(dirty["y"].nan_to_num(7.0), expected.nan_to_num(7.0))


def test_nan_in_A_reaches_every_token_of_its_channel(backend, device):
    inputs = at_precision(scan_inputs(14, 2, 5, 40, 2, initial_state=False), torch.float32, device)
    inputs["A"][3, 0] = float("nan")
    y = selective_scan_fn(**inputs, backend=backend)
    assert y[:, 3].isnan().all()
    assert y[:, [0, 1, 2, 4]].isfinite().all()


def test_nan_stays_in_its_packed_sequence(backend, device):
    inputs = at_precision(scan_inputs(15, 2, 5, 70, 2), torch.float32, device)
    seq_idx = PACKED.to(device)
    weights = weights_of(inputs)
    clean = outcome(selective_scan_fn, inputs, weights, seq_idx=seq_idx, backend=backend)
    inputs["u"][0, 3, 12] = float("nan")  # in the third sequence of the first row, tokens 10 to 40
    dirty = outcome(selective_scan_fn, inputs, weights, seq_idx=seq_idx, backend=backend)
    assert dirty["y"][0, 3, 12:41].isnan().all()
    for name in ("y", "du", "ddelta"):
        assert torch.equal(dirty[name][0, 3, 41:], clean[name][0, 3, 41:]), name
        assert torch.equal(dirty[name][0, 3, :10], clean[name][0, 3, :10]), name
    assert dirty["last_state"].isfinite().all()


@pytest.mark.parametrize("shape", [(2, 5, 0), (0, 5, 7), (2, 0, 7)])
def test_empty_input_gives_empty_output_and_the_initial_state(shape):
    batch, d_inner, seqlen = shape
    inputs = at_precision(scan_inputs(16, batch, d_inner, seqlen, 3), torch.float32)
    got = outcome(selective_scan_fn, inputs, weights_of(inputs))
    assert got["y"].shape == shape
    if seqlen == 0:
        assert torch.equal(got["last_state"], inputs["initial_state"])
    assert all(got[f"d{name}"].shape == inputs[name].shape for name in ("u", "A", "B", "D"))


def test_gradients_only_where_they_are_asked_for(backend, device):
    inputs = at_precision(scan_inputs(17, 2, 5, 33, 2), torch.float32, device)
    weights = weights_of(inputs)[0], torch.zeros(2, 5, 2)
    want = outcome(selective_scan_fn, inputs, weights, backend=backend)
    A = inputs.pop("A").requires_grad_()
    y = selective_scan_fn(A=A, **inputs, backend=backend)
    assert torch.equal(torch.autograd.grad(y, A, weights[0].to(device))[0], want["dA"])
    assert all(inputs[name].grad is None for name in inputs if isinstance(inputs[name], torch.Tensor))
    with torch.no_grad():
        assert not selective_scan_fn(A=A, **inputs, backend=backend).requires_grad
    with torch.inference_mode():
        assert torch.equal(selective_scan_fn(A=A, **inputs, backend=backend), y)


@pytest.mark.parametrize(
    "packing", [{}, {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])}, {"cu_seqlens": torch.tensor([0, 2, 2, 5])}]
)
def test_gradcheck_and_gradgradcheck(packing):
    inputs = scan_inputs(18, 1, 2, 5, 2, groups=1)
    if "cu_seqlens" in packing:
        inputs["initial_state"] = torch.randn(3, 2, 2, dtype=torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]

    def scan(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return selective_scan_fn(
            **named, delta_softplus=True, return_last_state=True, backend="torch", **packing
        )

    leaves = [inputs[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(scan, leaves)
    assert torch.autograd.gradgradcheck(scan, leaves)


def test_gradcheck_of_complex_A():
    inputs = scan_inputs(19, 1, 2, 4, 2, complex_A=True)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]

    def scan(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return selective_scan_fn(**named, delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(scan, [inputs[k].requires_grad_() for k in names])


@pytest.mark.parametrize(
    "fused", [pytest.param(b, marks=getattr(pytest.mark, b)) for b in ("numba", "triton", "cuda")]
)
def test_the_operator_is_registered_properly(fused):
    from mamba_fast.ops.selective_scan.arguments import normalise
    from mamba_fast.ops.selective_scan.registration import scan

    device = device_of(fused)
    inputs = at_precision(scan_inputs(20, 1, 3, 9, 2), torch.float32, device)
    softplus, state = inputs.pop("delta_softplus"), inputs.pop("initial_state")
    args = normalise(*inputs.values(), softplus, state, None, None)
    args = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    torch.library.opcheck(scan, (*args, False, True, fused))


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_bitwise_repeatable_on_request(backend, device, groups):
    """By the argument and by PyTorch's switch; in slots of memory, with the same result."""
    inputs = at_precision(scan_inputs(21, 2, 70, 40, 2, groups=groups), torch.float32, device)
    weights = weights_of(inputs)

    def run(**options):
        return outcome(selective_scan_fn, inputs, weights, backend=backend, **options)

    first, loose = run(deterministic=True), run()
    torch.use_deterministic_algorithms(True)
    try:
        second = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert errors(first[name], loose[name])[1] < 64 * torch.finfo(torch.float32).eps, name


@pytest.mark.gpu
@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=getattr(pytest.mark, b)) for b in ("triton", "cuda")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 512, 1000, 16), (1, 70, 4097, 16), (4, 300, 513, 8)])
def test_real_sizes_on_the_gpu(backend, shape, dtype):
    batch, d_inner, seqlen, d_state = shape
    inputs = scan_inputs(22, batch, d_inner, seqlen, d_state, groups=2)
    check_agrees(inputs, backend, dtype, "cuda")
