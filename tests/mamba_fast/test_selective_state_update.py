"""One step of the recurrence in place, on every backend, against the float64 oracle of the scan."""

import itertools

import pytest
import torch
from scan_inputs import in_numpy
from step_inputs import at_types, step_inputs

from mamba_fast import selective_state_update
from mamba_ref.checks import Row, bounds, errors
from mamba_ref.selective_scan import selective_scan, selective_scan_numpy

SIZES = [  # batch, heads (0: no such axis), channels of a head, N, groups
    (1, 0, 1, 1, 1), (1, 0, 5, 3, 1), (3, 0, 17, 16, 1), (2, 0, 65, 2, 1), (2, 0, 3, 100, 1),
    (1, 1, 2, 3, 1), (2, 4, 3, 5, 2), (3, 6, 7, 4, 3), (2, 3, 33, 2, 1), (2, 2, 4, 63, 2),
]  # fmt: skip
HALF, WIDE = torch.bfloat16, torch.float32


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def room(request):
    return request.param


@pytest.fixture
def device(room):
    return "cuda" if room == "triton" and torch.cuda.is_available() else "cpu"


def as_scan(inputs, indices, dtype=None):
    """The same step as a scan of one token: heads and their channels are one axis."""
    k = {n: v.to(dtype) if dtype and isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    state = k["state"] if indices is None else k["state"][indices.long()]
    batch, d_state = len(k["x"]), state.shape[-1]
    u, delta, z = (None if k[n] is None else k[n].reshape(batch, -1, 1) for n in ("x", "dt", "z"))
    D, bias = (None if k[n] is None else k[n].reshape(-1) for n in ("D", "dt_bias"))
    wide = torch.promote_types(state.dtype, torch.float32)
    return dict(
        u=u, delta=delta, A=k["A"].reshape(-1, d_state), B=k["B"].reshape(batch, -1, d_state, 1),
        C=k["C"].reshape(batch, -1, d_state, 1), D=D, z=z, delta_bias=bias, delta_softplus=k["dt_softplus"],
        return_last_state=True, initial_state=state.reshape(batch, -1, d_state).to(wide),
    )  # fmt: skip


def oracle(scan):
    """y and the last state of float64 arguments, wherever they are."""
    here = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in scan.items()}
    return dict(zip(("y", "state"), selective_scan_numpy(**in_numpy(here)), strict=True))


def rounding(room):
    """The same bits from the kernel; PyTorch's own operations round by layout and size."""
    return 16 * torch.finfo(WIDE).eps if room == "torch" else 0


def check_step(inputs, room, indices=None):
    """y and the new states against the oracle, under the bound of plain PyTorch in the same types."""
    before = inputs["state"].clone()
    truth = oracle(as_scan(inputs, indices, torch.float64))
    y, state = selective_scan(**as_scan(inputs, indices))
    plain = {"y": y, "state": state.to(before.dtype)}
    y = selective_state_update(**inputs, state_batch_indices=indices, backend=room)
    state = inputs["state"] if indices is None else inputs["state"][indices.long()]
    assert (y.shape, y.dtype, state.dtype) == (inputs["x"].shape, inputs["x"].dtype, before.dtype)
    got = {name: v.reshape(plain[name].shape) for name, v in (("y", y), ("state", state))}
    limits = bounds(plain, truth)
    rows = [Row(name, *errors(got[name], truth[name]), limits[name]) for name in truth]
    assert all(row.ok for row in rows), "\n".join(map(str, rows))
    return y


@pytest.mark.parametrize("size", SIZES)
def test_every_size(room, device, size):
    check_step(step_inputs(*size, seed=1, device=device), room)


@pytest.mark.parametrize("D, z, bias, softplus", list(itertools.product([True, False], repeat=4)))
@pytest.mark.parametrize("heads", [0, 2])
def test_every_option(room, device, heads, D, z, bias, softplus):
    inputs = step_inputs(2, heads, 5, 3, seed=2, device=device)
    for name, present in (("D", D), ("z", z), ("dt_bias", bias)):
        inputs[name] = inputs[name] if present else None
    inputs["dt_softplus"] = softplus
    inputs["dt"] = inputs["dt"] if softplus else inputs["dt"].abs() / 2
    check_step(inputs, room)


@pytest.mark.parametrize("state, io", [(WIDE, HALF), (HALF, WIDE), (HALF, HALF), (torch.float16,) * 2])
def test_the_state_keeps_its_type_and_y_has_that_of_x(room, device, state, io):
    check_step(at_types(step_inputs(2, 2, 9, 5, 2, seed=3, device=device), state, io), room)


def test_parameters_of_any_type(room, device):
    inputs = at_types(step_inputs(2, 0, 9, 5, seed=4, device=device), WIDE, HALF)
    inputs |= {name: inputs[name].bfloat16() for name in ("A", "D", "dt_bias")}
    wide = {name: inputs[name].float() for name in ("A", "D", "dt_bias")} | {"state": inputs["state"].clone()}
    y, want = (selective_state_update(**inputs | p, backend=room) for p in ({}, wide))
    assert torch.equal(y, want)
    assert torch.equal(inputs["state"], wide["state"])


def test_float64_is_computed_in_float64():
    inputs = step_inputs(2, 2, 5, 3, 2, seed=5)
    inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    truth = oracle(as_scan(inputs, None))
    y = selective_state_update(**inputs)
    few = 16 * torch.finfo(torch.float64).eps
    assert errors(y.reshape(truth["y"].shape), truth["y"])[1] < few
    assert errors(inputs["state"].reshape(truth["state"].shape), truth["state"])[1] < few


@pytest.mark.parametrize("size", [(2, 4, 5, 3, 2), (3, 3, 17, 16, 1), (2, 0, 7, 5, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_step_size_and_one_decay_a_head(room, device, size, bias):
    inputs = step_inputs(*size, seed=6, tied=True, device=device)
    inputs["dt_bias"] = inputs["dt_bias"] if bias else None
    assert inputs["A"].stride()[-2:] == (0, 0)
    check_step(inputs, room)


def test_a_step_size_of_its_own_beside_a_shared_decay(room, device):
    inputs = step_inputs(2, 3, 5, 4, seed=7, tied=True, device=device)
    check_step(inputs | {"dt": torch.randn(2, 3, 5, device=device)}, room)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("size", [(3, 0, 17, 5, 1), (4, 4, 3, 5, 2)])
def test_rows_of_a_larger_cache(room, device, size, dtype):
    inputs = step_inputs(*size, seed=8, slots=7, device=device)
    before = inputs["state"].clone()
    indices = torch.tensor([5, 0, 6, 2][: size[0]], dtype=dtype, device=device)
    if size[0] == 4:  # every second number of a tensor
        indices = torch.stack([indices, indices.flip(0)], 1)[:, 0]
    check_step(inputs, room, indices)
    others = [i for i in range(7) if i not in indices.tolist()]
    assert torch.equal(inputs["state"][others], before[others])


@pytest.mark.parametrize("heads", [0, 2])
def test_a_negative_index_is_padding(room, device, heads):
    inputs = step_inputs(5, heads, 9, 3, seed=9, device=device)
    indices = torch.tensor([-1, 3, -7, 0, -1], device=device)
    live = {k: v[[1, 3]] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    live["state"] = inputs["state"].clone()
    want = selective_state_update(**live, state_batch_indices=indices[[1, 3]], backend=room)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].clone()
        inputs[name][[0, 2, 4]] = float("nan")  # what stands in a padded row may be anything
    y = selective_state_update(**inputs, state_batch_indices=indices, backend=room)
    assert errors(y[[1, 3]], want)[1] <= rounding(room)
    assert torch.equal(y[[0, 2, 4]], torch.zeros_like(y[[0, 2, 4]]))
    assert errors(inputs["state"], live["state"])[1] <= rounding(room)
    assert torch.equal(inputs["state"][[1, 2, 4]], live["state"][[1, 2, 4]])


def test_padding_is_zero_also_where_a_parameter_is_not_finite(room, device):
    inputs = step_inputs(2, 0, 9, 3, seed=9, device=device)
    inputs["A"][4, 1] = float("nan")
    y = selective_state_update(
        **inputs, state_batch_indices=torch.tensor([-1, 1], device=device), backend=room
    )
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert y[1, 4].isnan()


@pytest.mark.triton
@pytest.mark.parametrize("walk, batch", [(1, 5), (2, 5), (5, 5), (3, 9)])
@pytest.mark.parametrize("indexed", [True, False])
def test_triton_walks_over_any_number_of_sequences(monkeypatch, walk, batch, indexed):
    from mamba_fast.ops.selective_state_update import triton_update

    monkeypatch.setattr(triton_update, "_plan", lambda *sizes: (4, walk, 1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = step_inputs(batch, 2, 11, 4, 2, seed=10, slots=batch, device=device)
    indices = torch.arange(batch, device=device).flip(0).roll(1) if indexed else None
    check_step(inputs, "triton", indices)


@pytest.mark.triton
@pytest.mark.parametrize(
    "size", [(1, 1, 5120), (2, 1, 70), (16, 1, 5120), (64, 80, 64), (256, 1, 5120), (300, 3, 1)]
)
@pytest.mark.parametrize("d_state", [1, 16, 128, 256])
def test_triton_plans_stay_within_the_work(size, d_state):
    from mamba_fast.ops.selective_state_update import triton_update

    block_p, walk, warps = triton_update._plan(*size, d_state, 132)
    assert 1 <= walk <= size[0]
    assert block_p * d_state >= 32 * warps or warps == 1


@pytest.mark.parametrize("tied", [True, False])
def test_many_steps_are_the_scan(room, device, tied):
    batch, channels, d_state, seqlen = 2, 5, 3, 33
    inputs = step_inputs(batch * seqlen, 0, channels, d_state, seed=11, tied=tied, device=device)
    inputs["state"] = torch.randn(batch, channels, d_state, device=device)
    tokens = {k: inputs[k].reshape(seqlen, batch, -1) for k in ("x", "dt", "B", "C", "z")}
    if tied:
        tokens["dt"] = tokens["dt"][..., :1].expand(seqlen, batch, channels)
    names = {"x": "u", "dt": "delta", "B": "B", "C": "C", "z": "z"}
    whole = {names[k]: v.permute(1, 2, 0).contiguous() for k, v in tokens.items()}
    whole |= {"A": inputs["A"], "D": inputs["D"], "delta_bias": inputs["dt_bias"], "delta_softplus": True}
    whole |= {"initial_state": inputs["state"].clone(), "return_last_state": True}
    truth = oracle({k: v.double() if isinstance(v, torch.Tensor) else v for k, v in whole.items()})
    plain = dict(zip(("y", "state"), selective_scan(**whole), strict=True))
    steps = [inputs | {k: v[t] for k, v in tokens.items()} for t in range(seqlen)]
    ys = [selective_state_update(**step_t, backend=room) for step_t in steps]
    limits = bounds(plain, truth)
    assert errors(torch.stack(ys, -1), truth["y"])[1] <= limits["y"]
    assert errors(inputs["state"], truth["state"])[1] <= limits["state"]


LAYOUTS = {
    "sliced": lambda v: torch.stack([v, v + 1], dim=-1)[..., 0],
    "last axis outermost": lambda v: v.movedim(-1, 0).contiguous().movedim(0, -1),
    "padded rows": lambda v: torch.cat([v, v], dim=-1)[..., : v.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [0, 2])
def test_strided_arguments_give_the_same_result(room, device, heads, layout):
    inputs = step_inputs(3, heads, 9, 4, seed=12, device=device)
    relaid = {k: LAYOUTS[layout](v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    y, want = (selective_state_update(**k, backend=room) for k in (relaid, inputs))
    assert errors(y, want)[1] <= rounding(room)
    assert errors(relaid["state"], inputs["state"])[1] <= rounding(room)


def test_a_nan_stays_in_its_channel(room, device):
    inputs = step_inputs(3, 2, 5, 4, 2, seed=13, device=device)
    clean = inputs | {"state": inputs["state"].clone()}
    want = selective_state_update(**clean, backend=room)
    inputs["dt"] = inputs["dt"].clone()
    inputs["dt"][1, 0, 3] = float("nan")
    y = selective_state_update(**inputs, backend=room)
    assert y[1, 0, 3].isnan()
    assert inputs["state"][1, 0, 3].isnan().all()
    want[1, 0, 3] = y[1, 0, 3] = 0
    clean["state"][1, 0, 3] = inputs["state"][1, 0, 3] = 0
    assert torch.equal(y, want)
    assert torch.equal(inputs["state"], clean["state"])


def test_small_steps_keep_their_digits(room, device):
    inputs = step_inputs(2, 0, 9, 3, seed=14, device=device)
    check_step(inputs | {"dt": inputs["dt"] - 12, "D": None, "state": 1e-5 * inputs["state"]}, room)


def test_an_empty_batch():
    inputs = step_inputs(0, 0, 5, 3, seed=15)
    assert selective_state_update(**inputs).shape == (0, 5)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("state, io", [(HALF, HALF), (WIDE, HALF), (WIDE, WIDE)])
@pytest.mark.parametrize("size", [(256, 0, 5120, 16, 1), (3, 0, 1536, 16, 1), (17, 80, 64, 128, 8)])
def test_real_sizes_in_a_cuda_graph(size, state, io, tied):
    inputs = at_types(step_inputs(*size, seed=21, tied=tied, device="cuda"), state, io)
    want = check_step(inputs | {"state": inputs["state"].clone()}, "triton")
    graph, start = torch.cuda.CUDAGraph(), inputs["state"].clone()
    with torch.cuda.graph(graph):
        y = selective_state_update(**inputs)
    inputs["state"].copy_(start)
    graph.replay()
    assert torch.equal(y, want)
