"""The CUDA kernels of the scan in every form that a size, a layout or a machine can give them."""

import re

import pytest
import torch
from cases import at_precision, check_agrees, device_of
from scan_inputs import scan_inputs

from mamba_fast import selective_scan_fn
from mamba_fast.ops.selective_scan import cuda_launch, cuda_plan, cuda_scan
from mamba_ref.checks import errors

pytestmark = pytest.mark.cuda
DEVICE = device_of("cuda")
SEQ_IDX = torch.cat(
    [torch.zeros(300), torch.ones(1), torch.full((127,), 2.0), torch.full((900,), 3.0)]
).long()
FEW = (8, 16, 4, 1, 2048, 4, 1)  # 8 lanes of 16 tokens: tiles of 128
PLAIN = (8, 8, 4, 1, 1024, 4, 1)  # the backward's with every warp on channels of its own
NEEDS = {"IO": 2, "N": 16, "HAS_Z": 1, "B_CONSTANT": 0, "C_CONSTANT": 0, "ORDERED": 1, "BUFFERS": 1}
CU_SEQLENS = torch.tensor([0, 10, 10, 128, 129, 512, 600, 1328])


@pytest.fixture
def cut(monkeypatch):
    """Prescribe how calls are cut: cut(forward kind, backward kind), in many stretches or in one."""

    def prescribe(forward, backward, stretched=False):
        stretches = (10**6 if stretched else 0, 10**6)
        if stretched:  # a chip so large that every tile is one
            monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: 10**4)
        for name, kind in {"cut_forward": forward, "cut_backward": backward, "cut_ordered": PLAIN}.items():
            kind = (*kind, stretches)
            monkeypatch.setattr(
                cuda_plan, name, lambda size, *_, kind=kind, **__: cuda_plan._cut(*kind, *size)
            )
        forget()

    def forget():
        cuda_scan._forward_calls.cache_clear()
        cuda_scan._backward_calls.cache_clear()
        cuda_plan._cut.cache_clear()

    yield prescribe
    forget()


# Lanes, steps and the rest of every row of the tables in cuda_plan, and some beside them.
FORWARD = sorted(
    {
        *cuda_plan.FORWARD.values(),
        FEW,
        (16, 16, 4, 1, 2048, 3, 2),
        (8, 8, 4, 1, 512, 8, 1),
        (8, 16, 8, 8, 2048, 2, 1),
        (8, 8, 4, 2, 512, 4, 2),
    }
)
BACKWARD = [
    *dict.fromkeys(
        kind
        for table in (cuda_plan.BACKWARD, cuda_plan.BACKWARD_ROOMY, cuda_plan.BACKWARD_MANY_STATES)
        for kind in table.values()
    ),
    *cuda_plan.LAST,
    (8, 8, 4, 1, 1024, 3, 2),
    (8, 8, 4, 2, 512, 3, 1),
]
KINDS = [
    (FORWARD[k % len(FORWARD)], BACKWARD[k % len(BACKWARD)]) for k in range(max(len(FORWARD), len(BACKWARD)))
]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_cut_of_a_warp(cut, kinds, dtype):
    cut(*kinds)
    check_agrees(scan_inputs(1, 2, 19, 600, 3), "cuda", dtype, DEVICE)


@pytest.mark.parametrize("A", [0.0, 0.4, -1e-25])
def test_a_state_that_does_not_decay_ends_with_its_packed_sequence(A):
    """The kernel's short way to end a sequence, a decay of zero, is not there for such an A."""
    inputs = scan_inputs(7, 1, 6, 300, 3, initial_state=False)
    inputs["A"][1:4] = A
    check_agrees(inputs, "cuda", device=DEVICE, packing={"seq_idx": SEQ_IDX[None, 200:500]})


@pytest.mark.parametrize("token", [3, 90])
def test_an_infinite_state_ends_with_its_packed_sequence(token):
    inputs = at_precision(scan_inputs(8, 1, 6, 300, 2, initial_state=False), torch.float32, DEVICE)
    seq_idx = SEQ_IDX[None, 200:500].to(DEVICE)
    clean = selective_scan_fn(**inputs, backend="cuda", seq_idx=seq_idx)
    inputs["u"][0, 1, token] = torch.inf
    y = selective_scan_fn(**inputs, backend="cuda", seq_idx=seq_idx)
    assert not y[0, 1, token:100].isfinite().any()
    assert torch.equal(y[..., 100:], clean[..., 100:])


def test_some_of_the_states_at_a_time(cut):
    """As many threads as there are states, and rows of B and C for half of them in shared memory."""
    cut((8, 8, 4, 1, 512, 4, 1), (8, 8, 4, 1, 512, 4, 1))
    check_agrees(scan_inputs(6, 2, 5, 200, 16), "cuda", device=DEVICE)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("packing", [{"seq_idx": SEQ_IDX[None]}, {"cu_seqlens": CU_SEQLENS}])
def test_every_cut_of_packed_rows(cut, kinds, packing):
    """A sequence that starts in the tile of one warp is none of the others' business, and yet it is."""
    cut(*kinds)
    inputs = scan_inputs(5, 1, 5, 1328, 2, initial_state=False)
    if "cu_seqlens" in packing:
        inputs["initial_state"] = torch.randn(len(CU_SEQLENS) - 1, 5, 2).double()
    check_agrees(inputs, "cuda", device=DEVICE, packing=packing)


@pytest.mark.parametrize("stretched", [False, True])
def test_long_packed_rows_by_warps_one_behind_the_other(cut, stretched):
    """More tokens than a warp looks ahead for starts."""
    cut((8, 16, 8, 8, 4096, 2, 1), (8, 8, 8, 8, 2048, 2, 1), stretched)
    edges = torch.tensor([700, 701, 3000, 4096, 8191, 8300])
    seq_idx = torch.bucketize(torch.arange(9000), edges, right=True)[None]
    inputs = scan_inputs(9, 1, 3, 9000, 1, initial_state=False)
    check_agrees(inputs, "cuda", device=DEVICE, packing={"seq_idx": seq_idx})


@pytest.mark.parametrize("packing", [{}, {"seq_idx": SEQ_IDX[None]}, {"cu_seqlens": CU_SEQLENS}])
@pytest.mark.parametrize("B, C", [("variable", "grouped"), ("constant", "variable")])
def test_a_sequence_cut_into_stretches(cut, packing, B, C):
    cut(FEW, PLAIN, stretched=True)
    inputs = scan_inputs(2, 1, 6, 1328, 2, B=B, C=C, initial_state=False)
    rows = len(CU_SEQLENS) - 1 if "cu_seqlens" in packing else 1
    inputs["initial_state"] = torch.randn(rows, 6, 2).double()
    assert cuda_plan.cut_forward((1, 6, 1328, 3, torch.device(DEVICE))).stretches > 1
    check_agrees(inputs, "cuda", device=DEVICE, packing=packing)


@pytest.mark.parametrize("kind", dict.fromkeys([*cuda_plan.ORDERED.values(), *cuda_plan.LAST]))
@pytest.mark.parametrize("groups", [1, 2])
def test_ordered_sums_over_several_groups_of_channels_a_block(cut, monkeypatch, groups, kind):
    cut(FEW, PLAIN)
    monkeypatch.setattr(cuda_plan, "cut_ordered", lambda size, *_: cuda_plan._cut(*kind, (0, 0), *size))
    monkeypatch.setattr(cuda_plan, "passes", lambda *args: 3)
    inputs = scan_inputs(3, 2, 70, 40, 2, groups=groups)

    def ordered(**options):
        return selective_scan_fn(**options, deterministic=True)

    check_agrees(inputs, "cuda", device=DEVICE, function=ordered)


@pytest.mark.parametrize("token", [20, 31])
def test_a_nan_in_dB_and_dC_reaches_its_eight_tokens(token):
    """dB comes against the tokens and dC along them; beyond the eight that are added up together: nothing."""
    inputs = at_precision(scan_inputs(8, 1, 6, 100, 2), torch.float32, DEVICE)
    inputs = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        inputs["u"][0, 1, token] = torch.nan
    y = selective_scan_fn(**inputs, backend="cuda")
    y.backward(torch.ones_like(y))
    first = token // 8 * 8
    assert inputs["C"].grad[..., :first].isfinite().all()
    assert inputs["C"].grad[..., token:].isnan().all()
    assert inputs["B"].grad[..., first + 8 :].isfinite().all()


@pytest.mark.parametrize("d_state", [1, 17, 256])
def test_few_and_many_states(d_state):
    check_agrees(scan_inputs(4, 1, 3, 40, d_state), "cuda", device=DEVICE)


@pytest.mark.parametrize(
    "rows, forward, backward", [(64, True, True), (1024, False, True), (8192, False, False)]
)
def test_few_rows_are_cut_into_stretches(monkeypatch, cut, rows, forward, backward):
    """On a chip of 132 multiprocessors; the backward has more to gain from more warps."""
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: 132)
    cuda_plan._cut.cache_clear()
    size = (1, rows, 16384, rows, torch.device("cpu"))
    assert (cuda_plan.cut_forward(size).stretches > 1) == forward
    assert (cuda_plan.cut_backward(size, NEEDS).stretches > 1) == backward


@pytest.mark.parametrize(
    "rows, io, roomy", [(5120, 2, False), (5120, 2, True), (5120, 0, False), (768, 2, True)]
)
def test_the_loop_is_unrolled_where_registers_are_left(rows, io, roomy):
    """Packed rows and sums in two parts need them; beside few rows there are enough for both."""
    cut = cuda_plan.cut_backward((1, rows, 2048, rows, torch.device("cpu")), NEEDS | {"IO": io}, roomy)
    assert cut.unroll == (2 if (rows, io, roomy) in ((5120, 2, False), (768, 2, True)) else 1)


@pytest.mark.parametrize("rows, seqlen", [(128, 4096), (384, 2048), (1024, 1024), (24576, 2048)])
def test_a_chip_with_less_shared_memory_gets_smaller_blocks(monkeypatch, cut, rows, seqlen):
    cpu = torch.device("cpu")
    size = (1, rows, seqlen, rows, cpu)

    def warps():
        return [
            cuda_plan.cut_forward(size).warps,
            cuda_plan.cut_backward(size, NEEDS).warps,
            cuda_plan.cut_ordered(size, NEEDS).warps,
        ]

    assert max(warps()) > 4
    monkeypatch.setattr(cuda_plan, "shared_limit", lambda device: 99 * 1024)
    assert warps() == [4, 4, 4]


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("rows, seqlen", [(4, 500), (300, 3000), (2000, 2000), (20000, 2000)])
def test_the_backward_of_any_number_of_states_has_room_on_any_chip(monkeypatch, kilobytes, rows, seqlen):
    limit = kilobytes * 1024
    monkeypatch.setattr(cuda_plan, "shared_limit", lambda device: limit)
    cuda_plan._cut.cache_clear()
    size = (1, rows, seqlen, rows, torch.device("cpu"))
    for d_state in (1, 16, 64, 65, 200, 256):
        for io, constant in ((0, 1), (2, 0)):
            needs = NEEDS | {"N": d_state, "IO": io, "B_CONSTANT": constant, "C_CONSTANT": constant}
            for choose in (cuda_plan.cut_backward, cuda_plan.cut_ordered):
                macros = needs | {"STAGE": 0}
                cut, macros = cuda_plan.fit("scan_backward", choose(size, needs), macros, size[-1])
                assert cuda_plan.shared_bytes("scan_backward", cut, macros) <= limit


def test_too_many_states_are_refused_by_name():
    inputs = at_precision(scan_inputs(4, 1, 2, 5, 257), torch.float32, DEVICE)
    with pytest.raises(ValueError, match="it holds at most 256 states a channel, and A has 257"):
        selective_scan_fn(**inputs, backend="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_aligned(dtype):
    """An odd length, and tensors that begin one element after a multiple of 16 bytes: the same bits."""
    inputs = at_precision(scan_inputs(5, 2, 6, 48, 2), dtype, DEVICE)

    def shifted(v):
        return torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape)

    moved = inputs | {k: shifted(inputs[k]) for k in ("u", "delta", "z", "B", "C")}
    got, want = (selective_scan_fn(**i, backend="cuda") for i in (moved, inputs))
    assert torch.equal(got, want)


def test_strides_of_more_than_31_bits(monkeypatch):
    inputs = at_precision(scan_inputs(6, 1, 6, 70, 2), torch.float32, DEVICE)
    want = selective_scan_fn(**inputs, backend="cuda")
    cuda_scan._forward_calls.cache_clear()
    monkeypatch.setattr(cuda_plan, "is_big", lambda *looks: True)
    assert torch.equal(selective_scan_fn(**inputs, backend="cuda"), want)
    cuda_scan._forward_calls.cache_clear()


def test_less_shared_memory_gives_the_same_result(cut, monkeypatch):
    """As on GPUs that give a block less than 100 KB: fewer rows of B and C at a time."""
    cut(FEW, PLAIN)
    inputs = at_precision(scan_inputs(7, 1, 6, 200, 16), torch.float32, DEVICE)
    want = selective_scan_fn(**inputs, backend="cuda")
    cut(FEW, PLAIN)
    monkeypatch.setattr(cuda_plan, "shared_limit", lambda device: 48 * 1024)
    got = selective_scan_fn(**inputs, backend="cuda")
    assert errors(got, want)[1] == 0


def test_the_parameters_of_the_kernels_lie_as_python_packs_them():
    text = next(p for p in cuda_plan.SOURCES["scan_forward"] if p.name == "cuda_tiles.cuh").read_text()
    struct = re.search(r"struct Params \{(.*?)\};", text, re.DOTALL)[1]
    kinds = "const io_t|const float|const int|const uint32|io_t|float|int64|int"
    members = re.findall(rf"({kinds})\*? ([^;]+);", struct)
    named = [(kind, name.strip(" *\n")) for kind, names in members for name in names.split(",")]
    pointers = [name for kind, name in named if kind not in ("int64", "int")]
    assert pointers == cuda_launch._POINTERS
    assert [name for kind, name in named if kind == "int64"] == cuda_launch._STRIDES
    assert [name for kind, name in named if kind == "int"] == cuda_launch._INTEGERS
