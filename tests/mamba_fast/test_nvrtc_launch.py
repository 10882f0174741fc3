"""CUDA C++ launched on a GPU: streams, graphs, threads, devices, and launches that are refused."""

import ctypes
import logging
import threading

import pytest
import torch
from cuda_sources import write_sources

from mamba_fast import nvrtc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nvrtc.available(), reason="this machine has no cuda-core and NVRTC"),
]

DYNAMIC = """
extern "C" __global__ void reverse(Params p) {
    extern __shared__ float held[];
    for (int i = threadIdx.x; i < p.size; i += blockDim.x) held[i] = p.y[i];
    __syncthreads();
    for (int i = threadIdx.x; i < p.size; i += blockDim.x) p.y[i] = held[p.size - 1 - i];
}
"""


class Params(ctypes.Structure):
    _fields_ = (("y", ctypes.c_void_p), ("size", ctypes.c_longlong), ("step", ctypes.c_float))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBA_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sources(tmp_path):
    return write_sources(tmp_path)


@pytest.fixture
def compiled(caplog):
    """How many compilations were logged so far."""
    caplog.set_level(logging.INFO, logger="mamba_fast")
    return lambda: sum(record.message.startswith("compiled ") for record in caplog.records)


def load(sources, entry="add", shared_bytes=0, device=None):
    return nvrtc.Kernel.load(sources, {"FACTOR": 3}, entry, shared_bytes, device)


def add_to(y, kernel, **options):
    """y += 3 · 0.5, by 96 threads a block."""
    params = Params(y.data_ptr(), y.numel(), 0.5)
    kernel.launch(-(-y.numel() // 96), 96, params, **options)


def zeros(size, device="cuda"):
    return torch.zeros(size, device=device)


@pytest.mark.parametrize("size", [1, 95, 97, 7_000_003])
def test_a_launch_computes(sources, size):
    y = zeros(size)
    add_to(y, load(sources))
    assert (y == 1.5).all()


def test_a_kernel_is_loaded_once_for_each_device_and_meaning(sources, compiled):
    kernels = {load(sources) for _ in range(3)}
    assert len(kernels) == 1
    assert compiled() == 1
    assert load(sources, shared_bytes=1000) not in kernels
    assert compiled() == 1


def test_threads_that_load_and_launch_together(sources, compiled):
    """Also threads that never used CUDA before: they have no current context."""
    parts = [zeros(1000) for _ in range(8)]
    torch.cuda.synchronize()
    threads = [threading.Thread(target=lambda y=y: add_to(y, load(sources, device=0))) for y in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert all((y == 1.5).all() for y in parts)
    assert compiled() == 1


@pytest.mark.parametrize("named", [True, False])
def test_a_stream_of_its_own(sources, named):
    """The launch waits for what its stream does, and only that: the default stream is idle meanwhile."""
    kernel, y, stream = load(sources), zeros(1000), torch.cuda.Stream()
    y.clone()  # loads torch's kernel, which may wait for all streams
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        if not named:
            add_to(y, kernel)
    if named:
        add_to(y, kernel, stream=stream.cuda_stream)
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        before = y.clone()
    other.synchronize()
    assert not stream.query()
    stream.synchronize()
    assert (before == 0).all()
    assert (y == 1.5).all()


@pytest.mark.parametrize("loaded", ["before", "during"])
def test_a_graph_captures_the_launch(sources, loaded):
    kernel, y, graph = None, zeros(1000), torch.cuda.CUDAGraph()
    if loaded == "before":
        kernel = load(sources)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        add_to(y, kernel or load(sources))
    torch.cuda.synchronize()
    assert (y == 0).all()
    for _ in range(3):
        graph.replay()
    assert (y == 4.5).all()


def test_shared_memory_beyond_what_a_kernel_gets_unasked(tmp_path):
    sources = write_sources(tmp_path, DYNAMIC)
    y = torch.arange(20_001.0, device="cuda")
    want = y.flip(0)
    load(sources, "reverse", 4 * 20_001).launch(1, 512, Params(y.data_ptr(), 20_001, 0))
    assert torch.equal(y, want)


def test_wrong_launches_and_loads_raise(sources):
    kernel, y = load(sources), zeros(10)
    params = Params(y.data_ptr(), 10, 0.5)
    for grid, threads in ((0, 96), (1, 0), (1, 2048), (2**31, 96)):
        refused = rf"launching add on cuda:0, {grid} blocks of {threads} .*: inv"
        with pytest.raises(RuntimeError, match=refused):
            kernel.launch(grid, threads, params)
    with pytest.raises(RuntimeError, match=r"subtract on cuda:0 \(the sources have add\): .*not found"):
        load(sources, "subtract")
    with pytest.raises(RuntimeError, match=r"loading add on cuda:0: 1000000 bytes of shared memory"):
        load(sources, shared_bytes=1_000_000)
    kernel.launch(1, 96, params)  # a refused launch leaves the device as it was
    assert (y == 1.5).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_device_gets_its_own(sources):
    parts = [zeros(1000, f"cuda:{i}") for i in range(2)]
    for current in range(2):
        with torch.cuda.device(current):
            for i, y in enumerate(parts):
                add_to(y, load(sources, device=i))
            assert torch.cuda.current_device() == current
    assert all((y == 3).all() for y in parts)
