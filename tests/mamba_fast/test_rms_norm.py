"""Add and norm on every backend against float64: outputs and every gradient."""

import itertools

import pytest
import torch

from mamba_fast import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_fast.ops.rms_norm.registration import add_norm
from mamba_ref.checks import Row, bounds, errors
from mamba_ref.rms_norm import rms_norm_numpy

SHAPES = [(1,), (1, 1), (3, 2), (2, 3, 5), (1, 63), (5, 64), (2, 2, 65), (3, 100), (300, 3)]
FLOAT, HALF = torch.float32, torch.bfloat16
EPS = 1e-3  # large enough to be noticed


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def room(request):
    return request.param


@pytest.fixture
def device(room):
    return "cuda" if room == "triton" and torch.cuda.is_available() else "cpu"


def norm_inputs(*shape, seed=0, x=FLOAT, weight=FLOAT, residual=FLOAT, bias=True, device="cpu"):
    """x, weight, bias, residual by name; a type of None leaves the residual out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    return dict(
        x=normal(shape, x), weight=normal(shape[-1:], weight),
        bias=normal(shape[-1:], weight) if bias else None,
        residual=None if residual is None else normal(shape, residual),
    )  # fmt: skip


def plain(x, weight, bias, residual, sum_dtype, rms, eps=EPS):
    """y and the sum, by PyTorch's library norm at the precision of the arguments, float32 at least."""
    wide = torch.promote_types(x.dtype, FLOAT)
    s = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    weight, bias = (None if v is None else v.to(wide) for v in (weight, bias))
    if rms:
        y = torch.nn.functional.rms_norm(s, s.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    else:
        y = torch.nn.functional.layer_norm(s, s.shape[-1:], weight, bias, eps)
    return y.to(x.dtype), s.to(sum_dtype)


def outcome(function, inputs, use_sum=True):
    """y, the sum and every gradient by name; the cotangents depend on the shape alone."""
    leaves = {k: None if v is None else v.detach().clone().requires_grad_() for k, v in inputs.items()}
    results = function(**leaves)[: 2 if use_sum else 1]
    generator = torch.Generator().manual_seed(99)
    cotangents = [torch.randn(r.shape, generator=generator).to(r.device, HALF).to(r.dtype) for r in results]
    grown = {f"d{k}": v for k, v in leaves.items() if v is not None}
    grads = torch.autograd.grad(results, grown.values(), cotangents)
    return dict(zip(("y", "s"), results, strict=False)) | dict(zip(grown, grads, strict=True))


def check_norm(inputs, room, rms, prenorm=True, in_fp32=True):
    """y, s and every gradient against float64, under the bound of PyTorch's library norm."""
    x, residual = inputs["x"], inputs["residual"]
    sum_dtype = residual.dtype if residual is not None else FLOAT if in_fp32 else x.dtype

    def norm(**given):
        options = {"eps": EPS, "prenorm": prenorm, "residual_in_fp32": in_fp32, "backend": room}
        results = rms_norm_fn(**given, **options) if rms else layer_norm_fn(**given, **options)
        return results if prenorm else (results,)

    exact = {k: None if v is None else v.double() for k, v in inputs.items()}
    truth = outcome(lambda **k: plain(**k, sum_dtype=torch.float64, rms=rms), exact, prenorm)
    usual = outcome(lambda **k: plain(**k, sum_dtype=sum_dtype, rms=rms), inputs, prenorm)
    got = outcome(norm, inputs, prenorm)
    limits = bounds(usual, truth)
    rows = [Row(name, *errors(got[name], truth[name]), limits[name]) for name in truth]
    assert all(row.ok for row in rows), "\n".join(map(str, rows))
    assert {k: (v.dtype, v.shape) for k, v in got.items()} == {
        k: (v.dtype, v.shape) for k, v in usual.items()
    }


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_size(room, device, shape, rms):
    check_norm(norm_inputs(*shape, seed=1, device=device), room, rms)


@pytest.mark.parametrize(
    "rms, bias, residual, prenorm, in_fp32", list(itertools.product([True, False], repeat=5))
)
def test_every_option(room, device, rms, bias, residual, prenorm, in_fp32):
    inputs = norm_inputs(3, 9, seed=2, bias=bias, residual=FLOAT if residual else None, x=HALF, device=device)
    check_norm(inputs, room, rms, prenorm, in_fp32)


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize(
    "x, residual, weight",
    [
        (HALF, FLOAT, HALF),
        (HALF, HALF, FLOAT),
        (torch.float16, FLOAT, FLOAT),
        (FLOAT, HALF, FLOAT),
        (HALF, None, FLOAT),
    ],
)
def test_types(room, device, x, residual, weight, rms):
    check_norm(norm_inputs(4, 33, seed=3, x=x, residual=residual, weight=weight, device=device), room, rms)


def test_the_oracle_of_the_reference(room, device):
    inputs = norm_inputs(2, 3, 65, seed=4, bias=False, residual=None, device=device)
    want = rms_norm_numpy(*(inputs[k].double().cpu().numpy() for k in ("x", "weight")), EPS)
    usual = plain(**inputs, sum_dtype=FLOAT, rms=True)[0]
    got = rms_norm_fn(**inputs, eps=EPS, backend=room)
    assert errors(got, want)[1] <= bounds({"y": usual}, {"y": want})["y"]


def test_the_norm_reads_the_sum_before_it_is_rounded(room, device):
    """1 + 2^-9 is no bfloat16 number: rounded, every row would be ones and its layer norm zero."""
    x = torch.zeros(4, 64, dtype=HALF, device=device)
    x[:, ::2] = 2.0**-9
    residual, weight = torch.ones_like(x), torch.ones(64, device=device)
    y, s = layer_norm_fn(x, weight, None, residual, eps=0.0, prenorm=True, backend=room)
    assert torch.equal(s, torch.ones_like(s))
    assert torch.equal(y.float(), torch.tensor([1.0, -1.0], device=device).repeat(4, 32))


def test_large_means_do_not_cancel(room, device):
    inputs = norm_inputs(4, 100, seed=5, residual=None, device=device)
    check_norm(inputs | {"x": inputs["x"] + 1000}, room, rms=False)


def test_without_a_residual_the_sum_is_x_itself(room, device):
    x, weight = torch.randn(2, 5, device=device), torch.randn(5, device=device)
    assert rms_norm_fn(x, weight, None, prenorm=True, backend=room)[1] is x
    assert (
        rms_norm_fn(x.to(HALF), weight, None, prenorm=True, residual_in_fp32=True, backend=room)[1].dtype
        == FLOAT
    )


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 3), (3, 0)])
def test_an_empty_x(shape):
    got = outcome(lambda **k: layer_norm_fn(**k, prenorm=True), norm_inputs(*shape))
    assert got["y"].shape == got["s"].shape == got["dx"].shape == shape
    assert torch.equal(got["dweight"], torch.zeros(shape[-1:]))


@pytest.mark.triton
@pytest.mark.parametrize("rows, programs", [(1, 1), (2, 1), (8, 1), (2, 3), (1, 100)])
@pytest.mark.parametrize("total", [1, 7, 13])
def test_triton_cuts_rows_in_any_way(monkeypatch, rows, programs, total):
    from mamba_fast.ops.rms_norm import triton_norm

    for name in ("_FORWARD_TILE", "_BACKWARD_TILE"):
        monkeypatch.setattr(triton_norm, name, rows * 16)
    monkeypatch.setattr(triton_norm, "_PROGRAMS_A_MULTIPROCESSOR", programs)
    for name in ("_forward_launch", "_backward_launches"):  # not those prepared with other tiles
        monkeypatch.setattr(triton_norm, name, getattr(triton_norm, name).__wrapped__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_norm(norm_inputs(total, 11, seed=6, x=HALF, device=device), "triton", rms=False)


LAYOUTS = {
    "channel-last": lambda v: v.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda v: torch.stack([v, v + 1], dim=-1)[..., 0],
    "padded rows": lambda v: torch.cat([v, v], dim=-1)[..., : v.shape[-1]],
    "batch inside": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_give_the_same_result(room, device, layout):
    """The same bits from the kernel; PyTorch's own operations round by layout."""
    allowed = 16 * torch.finfo(FLOAT).eps if room == "torch" else 0
    inputs = norm_inputs(2, 3, 40, seed=7, device=device)

    def norm(relay, **given):
        given |= {k: relay(given[k]) for k in ("x", "residual")}
        given |= {k: torch.stack([given[k]] * 2, -1)[:, 0] for k in ("weight", "bias")}
        return layer_norm_fn(**given, prenorm=True, backend=room)

    found = outcome(lambda **k: norm(LAYOUTS[layout], **k), inputs)
    want = outcome(lambda **k: norm(lambda v: LAYOUTS[layout](v).contiguous(), **k), inputs)
    assert all(errors(found[name], want[name])[1] <= allowed for name in want)


def test_a_nan_stays_in_its_row(room, device):
    inputs = norm_inputs(5, 9, seed=8, device=device)
    results = []
    for value in (0.5, float("nan")):
        inputs["x"][3, 2] = value
        results.append(outcome(lambda **k: layer_norm_fn(**k, prenorm=True, backend=room), inputs))
    clean, dirty = results
    rest = [0, 1, 2, 4]
    assert dirty["y"][3].isnan().all()
    assert dirty["dx"][3].isnan().all()
    for name in ("y", "s", "dx", "dresidual"):
        assert torch.equal(dirty[name][rest], clean[name][rest]), name


def test_a_gradient_of_the_sum_alone(room, device):
    inputs = norm_inputs(3, 9, seed=9, x=HALF, device=device)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    _, s = rms_norm_fn(**leaves, prenorm=True, backend=room)
    weights = torch.randn_like(s).to(HALF).float()  # nothing to round
    dx, dresidual = torch.autograd.grad(s, (leaves["x"], leaves["residual"]), weights)
    assert torch.equal(dresidual, weights)
    assert torch.equal(dx, weights.to(HALF))


@pytest.mark.triton
def test_triton_gradients_are_bitwise_repeatable():
    inputs = norm_inputs(40, 33, seed=10, device="cuda" if torch.cuda.is_available() else "cpu")
    first, second = (
        outcome(lambda **k: layer_norm_fn(**k, prenorm=True, backend="triton"), inputs) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rms", [True, False])
def test_gradcheck_and_gradgradcheck(rms):
    leaves = [v.double().requires_grad_() for v in norm_inputs(2, 5, seed=11).values()]

    def norm(x, weight, bias, residual):
        return layer_norm_fn(x, weight, bias, residual, eps=EPS, prenorm=True, is_rms_norm=rms)

    assert torch.autograd.gradcheck(norm, leaves)
    assert torch.autograd.gradgradcheck(norm, leaves)


@pytest.mark.triton
@pytest.mark.parametrize("residual, store", [(FLOAT, True), (HALF, True), (None, True), (None, False)])
@pytest.mark.parametrize("rms", [True, False])
def test_the_operator_is_registered_properly(residual, store, rms):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = norm_inputs(3, 9, seed=12, x=HALF, residual=residual, bias=not rms, device=device)
    given = [None if v is None else v.requires_grad_() for v in inputs.values()]
    torch.library.opcheck(add_norm, (*given, EPS, residual or FLOAT, rms, store, True))
    with torch.no_grad():
        torch.library.opcheck(add_norm, (*given, EPS, residual or FLOAT, rms, store, False))


@pytest.mark.parametrize("prenorm", [True, False])
def test_a_model_around_it_compiles_without_a_break(room, device, prenorm):
    inputs = norm_inputs(3, 9, seed=13, x=HALF, bias=False, device=device)

    def model(x, weight, bias, residual):
        results = rms_norm_fn(x * 2, weight, bias, residual, prenorm=prenorm, backend=room)
        return [r + 1 for r in results] if prenorm else [results + 1]

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = outcome(compiled, inputs, prenorm), outcome(model, inputs, prenorm)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_module(room, device):
    norm = RMSNorm(9, eps=EPS, device=device, dtype=HALF)
    inputs = norm_inputs(3, 9, seed=14, x=HALF, weight=HALF, bias=False, device=device)
    assert [*norm.state_dict()] == ["weight"]
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    norm.load_state_dict({"weight": inputs["weight"]})
    got = norm(inputs["x"], inputs["residual"], prenorm=True, residual_in_fp32=True)
    want = rms_norm_fn(**inputs, eps=EPS, prenorm=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert RMSNorm(3).eps == 1e-5


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 1000, 768), (4097, 1536), (129, 5120), (9, 8192), (3, 32768), (100000, 7)]
)
def test_real_sizes_on_the_gpu(shape, rms):
    check_norm(norm_inputs(*shape, seed=15, x=HALF, weight=HALF, device="cuda"), "triton", rms)
