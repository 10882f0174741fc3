"""CUDA C++ compiled by NVRTC, without a GPU: the cache on disk, errors, resource counts."""

import concurrent.futures
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cuda_sources import ADD, STRUCT, write_sources

from mamba_fast import nvrtc, nvrtc_cubin

ROOT = Path(__file__).parents[2]
NEEDY = """
__device__ __noinline__ float picked(float* y, int i) {
    float local[64];
    for (int j = 0; j < 64; j++) local[j] = y[j * i];
    return local[(int)y[0] & 63];
}
extern "C" __global__ void calls(Params p) { p.y[1] = picked(p.y, p.size); }
extern "C" __global__ void shares(Params p) {
    __shared__ float tile[77];
    tile[threadIdx.x] = p.y[threadIdx.x];
    __syncthreads();
    p.y[threadIdx.x] = tile[76 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(1024, 2) spills(Params p) {
    float a[100];
    for (int j = 0; j < 100; j++) a[j] = p.y[j * p.size];
    for (int k = 0; k < p.size; k++) {
        #pragma unroll
        for (int j = 0; j < 100; j++) a[j] = a[j] * p.y[k] + a[(j + 1) % 100];
    }
    for (int j = 0; j < 100; j++) p.y[j * p.size] = a[j];
}
"""
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")

with_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="this machine has no cuda-core and NVRTC")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MAMBA_FAST_CACHE", str(folder))
    return folder


@pytest.fixture
def sources(tmp_path):
    return write_sources(tmp_path)


@pytest.fixture
def compiled(caplog):
    """How many compilations were logged so far."""
    caplog.set_level(logging.INFO, logger="mamba_fast")
    return lambda: sum(record.message.startswith("compiled ") for record in caplog.records)


@with_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(sources, arch):
    cubin = nvrtc.compile_cubin(sources, {"FACTOR": 3}, arch)
    assert list(nvrtc.registers_and_spills(cubin)) == ["add"]


@with_nvrtc
def test_the_second_time_nothing_is_compiled(sources, compiled, caplog, cache):
    first = nvrtc.compile_cubin(sources, {"FACTOR": 3, "OTHER": 1}, "sm_90")
    assert compiled() == 1
    assert re.fullmatch(r"compiled params.cuh, add.cu for sm_90 in \d+\.\d s", caplog.messages[-1])
    assert nvrtc.compile_cubin(sources, {"OTHER": 1, "FACTOR": 3}, "sm_90") == first
    assert compiled() == 1
    assert [p.suffix for p in cache.iterdir()] == [".cubin"]


@with_nvrtc
@pytest.mark.parametrize("changed", ["source", "defines", "arch", "options", "compiler"])
def test_what_changes_the_result_is_compiled_again(sources, compiled, monkeypatch, cache, changed):
    nvrtc.compile_cubin(sources, {"FACTOR": 3}, "sm_90")
    defines, arch = {"FACTOR": 3}, "sm_90"
    if changed == "source":
        sources[1].write_text(ADD.replace("+=", "-="))
    elif changed == "defines":
        defines = {"FACTOR": 4}
    elif changed == "arch":
        arch = "sm_80"
    elif changed == "options":
        monkeypatch.setitem(nvrtc._OPTIONS, "ftz", False)
    else:
        monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: [99, 0])
    nvrtc.compile_cubin(sources, defines, arch)
    assert compiled() == 2
    assert len(list(cache.iterdir())) == 2


@with_nvrtc
@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry[:-1],
        lambda entry: b"",
        lambda entry: entry[:100] + bytes([entry[100] ^ 1]) + entry[101:],
        lambda entry: bytes([entry[0] ^ 1]) + entry[1:],
    ],
    ids=["truncated", "empty", "a bit of the cubin", "a bit of the digest"],
)
def test_a_damaged_entry_is_compiled_again_and_mended(sources, compiled, cache, damage):
    whole = nvrtc.compile_cubin(sources, {"FACTOR": 3}, "sm_90")
    (entry,) = cache.iterdir()
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    assert nvrtc.compile_cubin(sources, {"FACTOR": 3}, "sm_90") == whole
    assert compiled() == 2
    assert (list(cache.iterdir()), entry.read_bytes()) == ([entry], good)


@with_nvrtc
def test_processes_that_start_together(sources, cache, compiled):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        jobs = [pool.submit(nvrtc.compile_cubin, sources, {"FACTOR": 3}, "sm_90") for _ in range(8)]
        cubins = {job.result(timeout=60) for job in jobs}
    assert cubins == {nvrtc.compile_cubin(sources, {"FACTOR": 3}, "sm_90")}
    assert compiled() == 0
    assert [p.suffix for p in cache.iterdir()] == [".cubin"]


def test_writers_and_a_reader_at_once(cache):
    """A reader finds nothing or a whole entry, while threads replace it."""
    cubin = os.urandom(200_000)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            nvrtc_cubin.write("k", cubin)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while not (cache / "k.cubin").exists():
        pass
    found = {nvrtc_cubin.read("k") for _ in range(100)}
    stop.set()
    for writer in writers:
        writer.join()
    assert found == {cubin}
    assert [p.name for p in cache.iterdir()] == ["k.cubin"]


def test_a_folder_that_takes_no_files(tmp_path, cache, monkeypatch):
    """A temporary one serves instead, for the processes of this user alone; without one, nothing is kept."""
    cache.write_text("a file where the folder should be")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    nvrtc_cubin.write("k", b"cubin")
    assert nvrtc_cubin.read("k") == b"cubin"
    (folder,) = (tmp_path / "tmp").iterdir()
    assert [p.name for p in folder.iterdir()] == ["k.cubin"]
    if hasattr(os, "getuid"):
        folder.chmod(0o777)
        assert nvrtc_cubin.read("k") is None
    monkeypatch.setattr("tempfile.tempdir", str(cache))
    nvrtc_cubin.write("k", b"cubin")
    assert nvrtc_cubin.read("k") is None


def test_a_disk_that_fills_up_leaves_no_part_of_an_entry(tmp_path, cache, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.replace", full)
    nvrtc_cubin.write("k", b"cubin")
    assert list(tmp_path.rglob("*k*")) == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert nvrtc_cubin._preferred() == tmp_path / "cache"
    monkeypatch.delenv("MAMBA_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert nvrtc_cubin._preferred() == tmp_path / "xdg" / "mamba-fast"
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for unset in ("", "relative"):  # the XDG specification: relative paths are ignored
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert nvrtc_cubin._preferred() == tmp_path / "home" / ".cache" / "mamba-fast"


@with_nvrtc
def test_an_error_names_its_file_and_line(sources, cache):
    sources[0].write_text(STRUCT + "__device__ int right;\n")
    sources[1].write_text('\nextern "C" __global__ void add(Params p) {\n    p.y[0] = missing;\n}\n')
    with pytest.raises(RuntimeError, match=r'add\.cu\(3\): error: identifier "missing"') as raised:
        nvrtc.compile_cubin(sources, {"FACTOR": 3}, "sm_90")
    assert "params.cuh, add.cu for sm_90, with {'FACTOR': 3}" in str(raised.value)
    sources[0].write_text(STRUCT + "wrong int;")
    with pytest.raises(RuntimeError, match=r"params\.cuh\(2\): error"):
        nvrtc.compile_cubin(sources, {"FACTOR": 3}, "sm_90")
    assert not cache.exists()


@pytest.fixture
def needy(tmp_path):
    path = tmp_path / "needy.cu"
    path.write_text(STRUCT + NEEDY)
    return path


@with_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resources_show_spills_local_arrays_and_shared_memory(needy, arch):
    needs = nvrtc.registers_and_spills(nvrtc.compile_cubin([needy], {}, arch))
    assert needs.keys() == {"calls", "shares", "spills"}
    assert needs["spills"]["spilled"] > 0
    assert needs["calls"]["spilled"] >= 4 * 64
    assert needs["shares"]["spilled"] == 0
    assert needs["shares"]["shared"] - needs["calls"]["shared"] in (4 * 77, 1024 + 4 * 77)
    assert 0 < needs["spills"]["registers"] <= 65536 // 1024


@pytest.mark.triton
@with_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resources_are_those_of_cuobjdump(needy, tmp_path, arch):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = nvrtc.compile_cubin([needy], {}, arch)
    (tmp_path / "k.cubin").write_bytes(cubin)
    command = [tool, "-res-usage", tmp_path / "k.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert len(rows) == 3
    assert nvrtc.registers_and_spills(cubin) == {
        name: {"registers": int(reg), "spilled": int(stack) + int(local), "shared": int(shared)}
        for name, reg, stack, shared, local in rows
    }


def test_a_file_that_is_no_cubin_is_refused():
    with pytest.raises(ValueError, match="cubin: expected a 64-bit ELF file for NVIDIA GPUs"):
        nvrtc.registers_and_spills(Path(sys.executable).read_bytes())


@with_nvrtc
def test_the_architecture_is_the_newest_that_runs_on_the_device(monkeypatch):
    from cuda.bindings import nvrtc as bindings

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert nvrtc.architecture(0) == "sm_90"
    answer = (bindings.nvrtcResult.NVRTC_SUCCESS, [75, 80, 86, 90, 100])
    monkeypatch.setattr(bindings, "nvrtcGetSupportedArchs", lambda: answer)
    for capability, arch in (((8, 0), "sm_80"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 3), "sm_100")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert nvrtc.architecture(0) == arch
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    with pytest.raises(RuntimeError, match=r"not compile for compute capability 12\.0 .* 9\.0, 10\.0"):
        nvrtc.architecture(0)


def test_the_compiler_is_not_imported_before_it_is_used():
    code = (
        "import sys\n"
        "import mamba_fast.nvrtc as nvrtc\n"
        "assert not [m for m in sys.modules if m.startswith(('cuda.core', 'cuda.bindings.nvrtc'))]\n"
        "sys.modules['cuda'] = None\n"
        "print(nvrtc.available())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("False\n", "")


def test_not_available_where_the_library_is_missing(monkeypatch):
    def missing():
        raise RuntimeError("libnvrtc not found")

    monkeypatch.setattr(nvrtc, "_nvrtc_version", missing)
    assert nvrtc.available.__wrapped__() is False
