"""Launches that are prepared once do what Triton's own do: noted without a GPU, and on one to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from launch_inputs import CONVS, HALF, NORMS, UPDATES, conv, norm, unaligned, update
from triton.runtime.jit import JITFunction

from mamba_fast import causal_conv1d_fn, rms_norm_fn
from mamba_fast.ops.causal_conv1d import triton_conv
from mamba_fast.ops.rms_norm import triton_norm
from mamba_fast.ops.selective_state_update import triton_update
from mamba_fast.ops.triton_launch import Launch

pytestmark = pytest.mark.triton
TESTS = Path(__file__).parents[1]
ENVIRONMENT = {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
CHECKS = (
    "the_norms",
    "the_convolutions",
    "the_updates",
    "every_kernel_was_compared",
    "each_alignment_has_its_form",
    "each_device_has_its_form",
    "the_stream_is_that_of_the_moment",
    "hooks_see_each_launch",
    "a_form_for_another_purpose_is_neither_used_nor_kept",
    "a_changed_global_is_an_error",
    "an_unknown_version_launches_itself",
)


@pytest.fixture(scope="module")
def ahead():
    """What each check of launch_ahead.py found, in a process of its own whose driver takes notes."""
    command = [sys.executable, TESTS / "launch_ahead.py"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    lines = map(json.loads, run.stdout.splitlines())
    return {line["check"]: line["failed"] for line in lines}


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_gpu(ahead, check):
    assert ahead.keys() == set(CHECKS)
    assert ahead[check] is None, ahead[check]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "call, prepared",
    [
        (call, (room._forward_launch, room._backward_launches))
        for call, room in ((norm, triton_norm), (conv, triton_conv))
    ]
    + [(update, (triton_update._launch,))],
)
def test_a_call_that_comes_again_prepares_nothing(call, prepared):
    for kept in prepared:
        kept.cache_clear()
    for seed in range(3):
        call(seed, DEVICE, width=4)[0]()
        assert {kept.cache_info().misses for kept in prepared} == {1}


def as_triton_launches(monkeypatch, run):
    """What `run` returns where every launch is Triton's own."""
    with monkeypatch.context() as patch:
        patch.setattr(Launch, "__call__", Launch.plain)
        return run()


def same(got, want):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def own(monkeypatch):
    """The kernels that Triton launched itself, in turn."""
    kernels = []

    def run(self, *args, right=JITFunction.run, **kwargs):
        kernels.append(self.__name__)
        return right(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    return kernels


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call, options",
    [
        (call, options)
        for call, kinds in ((norm, NORMS), (conv, CONVS), (update, UPDATES))
        for options in kinds
    ],
)
def test_the_same_bits_for_each_kind_of_call(monkeypatch, own, call, options):
    runs = [call(seed, DEVICE, **options)[0] for seed in range(3)]  # all of them alive: other addresses
    got = [runs[0]()]
    own.clear()
    got += [run() for run in runs[1:]]
    assert set(own) <= {"reach_kernel"}
    assert all(same(g, as_triton_launches(monkeypatch, run)) for g, run in zip(got, runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [norm, conv, update])
def test_the_same_bits_for_changing_alignments(monkeypatch, call):
    runs = [call(seed, DEVICE, at=at)[0] for seed in range(3) for at in (torch.clone, unaligned)]
    got = [run() for run in runs]
    assert all(same(g, as_triton_launches(monkeypatch, run)) for g, run in zip(got, runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [norm, conv, update])
def test_on_the_stream_of_the_moment(own, call):
    """The inputs arrive late on that stream: a launch on another one would read what was there before."""
    (run, inputs), (late, others) = call(0, DEVICE), call(1, DEVICE)
    run(), late()
    want = late()
    torch.cuda.synchronize()
    own.clear()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        for mine, other in zip(inputs, others, strict=True):
            if mine is not None:
                mine.copy_(other)
        got = run()
        torch.cuda.current_stream().synchronize()
    assert own == []
    assert same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("call", [norm, conv, update])
def test_under_a_graph_capture(own, call):
    (run, inputs), (later, others) = call(0, DEVICE), call(1, DEVICE)
    run(), later()
    want = later()
    own.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    assert own == []
    for mine, other in zip(inputs, others, strict=True):
        if mine is not None:
            mine.copy_(other)
    graph.replay()
    assert same(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU at most")
@pytest.mark.parametrize("call", [norm, conv, update])
def test_on_another_device(call):
    """Where tensors look as they did on the first."""
    want = call(0, "cuda:0")[0]()
    with torch.cuda.device(1):
        for _ in range(2):
            got = call(0, "cuda:1")[0]()
    assert same([g if g is None else g.to("cuda:0") for g in got], want)


@pytest.mark.gpu
def test_the_public_functions_prepare_their_launches(own):
    """Forward, and a backward in autograd's thread."""

    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 50, 64, generator=generator).to(DEVICE, HALF).requires_grad_()
        weight, taps = torch.ones(64, device=DEVICE), torch.ones(64, 4, device=DEVICE)
        y, s = rms_norm_fn(x, weight.requires_grad_(), None, prenorm=True, residual_in_fp32=True)
        y = causal_conv1d_fn(y.transpose(1, 2), taps.requires_grad_(), activation="silu")
        (y.float().sum() + s.sum()).backward()

    step(0)
    own.clear()
    step(1)
    assert own == []
