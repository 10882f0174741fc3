"""The block as one operator against the reference's own pieces in float64, on every backend."""

import functools

import pytest
import torch
from inner_inputs import NORMS, at_precision, check_agrees, inner_inputs, outcome, reference

from mamba_fast import mamba_inner_fn
from mamba_ref.checks import bounds, errors

BIASES = ("conv1d_bias", "out_proj_bias", "D", "delta_bias", "B_proj_bias", "C_proj_bias")
SLOW = ("b_rms_weight", "c_rms_weight", "dt_rms_weight", "B_proj_bias", "C_proj_bias")  # not in a Mamba block


@pytest.mark.parametrize("seqlen", [1, 2, 33, 65])
def test_every_length(backend, device, seqlen):
    check_agrees(inner_inputs(seqlen, seqlen=seqlen, absent=SLOW), backend, device)


@pytest.mark.parametrize(
    "absent", [(), NORMS, BIASES, (*NORMS, *BIASES)], ids=["all", "plain", "norms", "none"]
)
@pytest.mark.parametrize("level", [0, 1])
def test_every_option(backend, device, absent, level):
    check_agrees(inner_inputs(1, absent=absent), backend, device, checkpoint_lvl=level)


@pytest.mark.parametrize(
    "batch, d_inner, d_state, rank, d_model, width", [(1, 1, 1, 1, 1, 2), (3, 17, 5, 3, 7, 3)]
)
def test_every_size(backend, device, batch, d_inner, d_state, rank, d_model, width):
    inputs = inner_inputs(2, batch, d_inner, 12, d_state, rank, width, d_model)
    check_agrees(inputs, backend, device)


@pytest.mark.parametrize("forms", [("constant", None), (None, "variable"), ("grouped", "constant")], ids=str)
def test_given_matrices(backend, device, forms):
    B, C = forms
    check_agrees(inner_inputs(3, B=B, C=C), backend, device)


def test_without_softplus(backend, device):
    inputs = inner_inputs(4, absent=("delta_bias",))
    inputs["delta_proj_weight"] *= 0.1  # a step size may be negative here: a small one
    check_agrees(inputs, backend, device, delta_softplus=False)


@pytest.mark.parametrize("forms", [(None, None), ("constant", "variable")], ids=str)
def test_complex_states(forms):
    B, C = forms
    check_agrees(inner_inputs(5, complex_A=True, B=B, C=C), None, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, device, dtype):
    check_agrees(inner_inputs(6, 2, 16, 40, 4, 3, absent=SLOW), backend, device, dtype)


@pytest.mark.parametrize("absent", [(), SLOW], ids=["all", "plain"])
def test_both_levels_are_the_same(backend, device, absent):
    """Bit for bit: what is found again is found by the same operations."""
    given = at_precision(inner_inputs(7, absent=absent), torch.float32, device)
    cotangent = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(1))
    kept, again = (
        outcome(mamba_inner_fn, given, cotangent, backend=backend, checkpoint_lvl=k) for k in (0, 1)
    )
    limits = bounds(kept, kept)  # the floor: sums of dB and dC may be added up in another order
    assert all(errors(again[k], kept[k])[1] <= limits[k] for k in kept)
    assert torch.equal(kept["out"], again["out"])


def test_a_level_keeps_what_it_says(backend, device):
    if backend == "torch":
        pytest.skip("autograd keeps everything on the torch backend")
    given = at_precision(inner_inputs(8, 2, 10, 33, absent=SLOW), torch.float32, device)

    def kept(level):
        """The shapes of all that is kept and has as many numbers as y, (B, D, L)."""
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            mamba_inner_fn(**{k: v if v is None else v.requires_grad_() for k, v in given.items()},
                           backend=backend, checkpoint_lvl=level)  # fmt: skip
        return [tuple(t.shape) for t in saved if t.numel() >= 2 * 10 * 33]

    xz, row = (2, 20, 33), (10, 66)  # a row: (D, B L)
    assert (kept(0), kept(1)) == ([xz, row, row, row], [xz])  # y, u, delta; none of them


@pytest.mark.parametrize("layout", ["channels", "tokens", "sliced"])
def test_views_give_the_same_result(backend, device, layout):
    given = at_precision(inner_inputs(9, absent=SLOW), torch.float32, device)
    cotangent = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(1))
    want = outcome(mamba_inner_fn, given, cotangent, backend=backend)
    xz = given["xz"]
    views = {
        "channels": xz.permute(1, 0, 2).contiguous().permute(1, 0, 2),  # as in_proj leaves it
        "tokens": xz.mT.contiguous().mT,
        "sliced": torch.nn.functional.pad(xz, (2, 3))[..., 2:-3],
    }
    leaf = views[layout].requires_grad_()
    assert torch.equal(leaf, xz)
    out = mamba_inner_fn(**given | {"xz": leaf}, backend=backend)
    (dxz,) = torch.autograd.grad(out, leaf, cotangent.to(device))
    limits = bounds(want, want)
    assert errors(out.detach(), want["out"])[1] <= limits["out"]
    assert errors(dxz, want["dxz"])[1] <= limits["dxz"]


def test_autocast(backend, device):
    """float32 weights beside bfloat16 tokens: the projections are cast, the rest is not."""
    given = at_precision(inner_inputs(10, 2, 8, 20, 4, 3, absent=SLOW), torch.float32, device)
    cotangent = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(1))
    half = given | {"xz": given["xz"].bfloat16()}
    want = outcome(mamba_inner_fn, half, cotangent, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        got = outcome(mamba_inner_fn, half, cotangent, backend=backend)
        from_float32 = outcome(mamba_inner_fn, given, cotangent, backend=backend)
    assert from_float32["out"].dtype == torch.bfloat16
    assert from_float32["dxz"].dtype == torch.float32
    limits = bounds(want, want)
    for name, value in want.items():
        assert errors(got[name], value)[1] <= limits[name], name
        assert errors(from_float32[name], value)[1] <= limits[name], name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does it
@pytest.mark.parametrize("absent", [(), SLOW], ids=["all", "plain"])
def test_compiles_without_a_break(backend, device, absent):
    given = at_precision(inner_inputs(11, absent=absent), torch.float32, device)
    cotangent = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(1))

    def model(**inputs):
        return 2 * mamba_inner_fn(**inputs, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, got = outcome(model, given, cotangent), outcome(compiled, given, cotangent)
    limits = bounds(want, want)
    for name in want:
        assert errors(got[name], want[name])[1] <= limits[name], name


@pytest.mark.parametrize("level", [0, 1])
def test_the_operator_is_registered_properly(backend, device, level):
    from mamba_fast.ops.mamba_inner import _cast, registration
    from mamba_fast.ops.mamba_inner.parts import Tensors

    if backend == "torch":
        pytest.skip("plain PyTorch needs no operator")
    given = at_precision(inner_inputs(12), torch.float32, device)
    t = _cast(Tensors(*given.values()))
    t = Tensors(*(v if v is None else v.detach().clone().requires_grad_() for v in t))
    conv = "triton" if backend == "triton" else "torch"
    torch.library.opcheck(
        registration.inner_operator, (*t, True, level, 1e-6, conv, backend, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor",
                    "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_gradcheck_and_gradgradcheck():
    inputs = {k: v for k, v in inner_inputs(13, 1, 3, 4, 2, 2, 2, 2).items() if v is not None}
    leaves = [v.clone().requires_grad_() for v in inputs.values()]

    def function(*values):
        return mamba_inner_fn(**dict(zip(inputs, values, strict=True)) | {"B": None, "C": None})

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_no_gradient_and_inference_mode(backend, device):
    given = at_precision(inner_inputs(14), torch.float32, device)
    want = mamba_inner_fn(**given, backend=backend)
    with torch.inference_mode():
        assert torch.equal(mamba_inner_fn(**given, backend=backend), want)


def test_out_can_be_changed_in_place(backend, device):
    """As the sum with a residual stream does; autograd would refuse it for a view."""
    given = at_precision(inner_inputs(19), torch.float32, device)
    cotangent = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(1))
    exact = at_precision(given, torch.float64, device)
    want, plain = (outcome(mamba_inner_fn, v, 2 * cotangent, backend="torch") for v in (exact, given))
    got = outcome(lambda **v: mamba_inner_fn(**v, backend=backend).mul_(2), given, cotangent)
    half = outcome(mamba_inner_fn, given, cotangent, backend=backend)
    assert torch.equal(got["out"], 2 * half["out"])
    limits = bounds(plain, want) | {"out": torch.inf}  # `want` is of half of it
    assert [k for k in want if errors(got[k], want[k])[1] > limits[k]] == []


@pytest.mark.parametrize("batch, seqlen", [(0, 5), (2, 0)])
def test_empty_input(batch, seqlen):
    given = at_precision(inner_inputs(15, batch, seqlen=seqlen), torch.float32)
    out = mamba_inner_fn(**{k: v if v is None else v.requires_grad_() for k, v in given.items()})
    assert out.shape == (batch, seqlen, 5)
    out.sum().backward()
    assert not given["x_proj_weight"].grad.any()


WRONG = {
    "xz": (lambda v: v[:, 1:], ValueError, r"xz: expected shape \(B, 2D, L\), got \(2, 11, 9\)"),
    "conv1d_weight": (lambda v: v[:, 0], ValueError, r"conv1d_weight: expected shape \(6, 1, any\)"),
    "conv1d_bias": (lambda v: v.half(), TypeError, "conv1d_bias: expected float32, got float16"),
    "x_proj_weight": (lambda v: v[1:], ValueError, r"x_proj_weight: expected shape \(8, 6\), got \(7, 6\)"),
    "delta_proj_weight": (lambda v: v[1:], ValueError, r"delta_proj_weight: expected shape \(6, any\)"),
    "out_proj_weight": (lambda v: v[:, 1:], ValueError, r"out_proj_weight: expected shape \(any, 6\)"),
    "out_proj_bias": (lambda v: v[1:], ValueError, r"out_proj_bias: expected shape \(5\), got \(4,\)"),
    "A": (lambda v: v.half(), TypeError, "A: expected float32 or complex64, got float16"),
    "D": (lambda v: v.half(), TypeError, "D: expected float32, got float16"),
    "delta_bias": (lambda v: v.tolist(), TypeError, "delta_bias: expected a torch.Tensor, got list"),
    "B_proj_bias": (lambda v: v[1:], ValueError, "B_proj_bias: expected shape"),
    "c_rms_weight": (lambda v: v[1:], ValueError, "c_rms_weight: expected shape"),
    "dt_rms_weight": (lambda v: v.int(), TypeError, "dt_rms_weight: expected float32 or float16"),
    "checkpoint_lvl": (lambda _: 2, ValueError, "checkpoint_lvl: expected 0 or 1, got 2"),
    "backend": (lambda _: "cublas", ValueError, "backend: expected None or one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name):
    change, kind, message = WRONG[name]
    given = at_precision(inner_inputs(16), torch.float32)
    with pytest.raises(kind, match=message):
        mamba_inner_fn(**given | {name: change(given.get(name))})


@pytest.mark.parametrize("form, cut, message", [
    ("constant", 1, r"B: expected shape \(6, 3\)"), ("variable", 1, r"B: expected shape \(2, 3, 9\)"),
    ("grouped", None, "B: the number of groups must divide D = 6, got G = 4"),
])  # fmt: skip
def test_errors_of_a_given_matrix(form, cut, message):
    given = at_precision(inner_inputs(17, B=form), torch.float32)
    B = given["B"][..., cut:] if cut else given["B"].repeat(1, 2, 1, 1)
    with pytest.raises(ValueError, match=message):
        mamba_inner_fn(**given | {"B": B})
    with pytest.raises(ValueError, match="b_rms_weight: belongs to the B that comes from x"):
        mamba_inner_fn(**given | {"b_rms_weight": torch.ones(3)})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes_on_the_gpu(dtype):
    inputs = inner_inputs(18, 2, 256, 300, 16, 8, 4, 128, absent=SLOW)
    check_agrees(inputs, None, "cuda", dtype)


def test_the_reference_is_the_block():
    """The reference of this file, once more by the module that students read."""
    from mamba_ref.block import MambaBlock

    torch.manual_seed(0)
    block = MambaBlock(6, d_state=3).double()
    hidden = torch.randn(2, 9, 6, dtype=torch.float64)
    xz = (block.in_proj.weight @ hidden.mT).detach()
    function = functools.partial(
        reference, xz, block.conv1d.weight, block.conv1d.bias, block.x_proj.weight, block.dt_proj.weight,
        block.out_proj.weight, None, -torch.exp(block.A_log), None, None, block.D, block.dt_proj.bias,
    )  # fmt: skip
    got, want = function(None, None, None, None, None), block(hidden)
    assert errors(got.detach(), want.detach())[1] <= 100 * torch.finfo(torch.float64).eps
