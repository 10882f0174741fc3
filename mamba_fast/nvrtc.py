"""CUDA C++ at run time: compile with NVRTC, keep the result on disk, load it, launch it.

NVRTC is a library, so no compiler is installed; it comes with the extra `cuda`. Nothing of it is imported
before the first use.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import threading
import time

import torch

from mamba_fast import nvrtc_cubin
from mamba_fast.nvrtc_cubin import registers_and_spills

__all__ = ["Kernel", "architecture", "available", "compile_cubin", "registers_and_spills"]

# Division and reciprocals as approximations (2 units in the last place), denormals as zeros.
_OPTIONS = {"std": "c++17", "ftz": True, "prec_div": False}
_log = logging.getLogger("mamba_fast")
_lock = threading.RLock()
_kernels = {}  # (device, sources, defines, entry, shared_bytes): Kernel
_contexts = {}  # device: its primary context, the one that torch uses


@functools.cache
def available():
    """Whether kernels can be compiled here: cuda-core, its bindings and NVRTC are installed. No GPU needed.

    The first call imports them (about half a second).
    """
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import driver  # noqa: F401

        _nvrtc_version()
    except (ImportError, RuntimeError):  # RuntimeError: the bindings are there, and the library is not
        return False
    return True


def _nvrtc_version():
    from cuda.bindings import nvrtc

    return _checked(nvrtc.nvrtcVersion(), "NVRTC")


def architecture(device):
    """The architecture to compile for on this device, such as "sm_90".

    A cubin runs on later GPUs of its major version too. So a GPU newer than NVRTC gets the newest
    architecture of its own major version; RuntimeError if NVRTC knows none.
    """
    from cuda.bindings import nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    known = _checked(nvrtc.nvrtcGetSupportedArchs(), "NVRTC")
    fitting = [number for number in known if number // 10 == major and number % 10 <= minor]
    if not fitting:
        version = ".".join(map(str, _nvrtc_version()))
        raise RuntimeError(
            f"NVRTC {version} does not compile for compute capability {major}.{minor} of {device}, "
            f"only for {', '.join(f'{n // 10}.{n % 10}' for n in known)}"
        )
    return f"sm_{max(fitting)}"


def compile_cubin(sources, defines, arch):
    """The cubin of CUDA C++ sources, from the cache or compiled now.

    sources : list of pathlib.Path, joined in this order to one translation unit
    defines : {name: integer}, macros
    arch : such as "sm_90"

    The cache is the folder MAMBA_FAST_CACHE, else mamba-fast in XDG_CACHE_HOME or ~/.cache; where it takes
    no files, a folder among the temporary ones. RuntimeError with the compiler's log if it refuses.
    """
    texts = [(path.name, path.read_text("utf-8")) for path in sources]
    defines = {name: int(value) for name, value in defines.items()}
    meant = [texts, sorted(defines.items()), _OPTIONS, arch, _nvrtc_version()]
    key = hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()
    cubin = nvrtc_cubin.read(key)
    if cubin is None:
        started = time.perf_counter()
        cubin = _compile(texts, defines, arch)
        seconds = time.perf_counter() - started
        _log.info("compiled %s for %s in %.1f s", ", ".join(name for name, _ in texts), arch, seconds)
        nvrtc_cubin.write(key, cubin)
    return cubin


def _compile(texts, defines, arch):
    from cuda.core import Program, ProgramOptions

    code = "".join(f'#line 1 "{name}"\n{text}\n' for name, text in texts)
    macros = [(name, str(value)) for name, value in defines.items()]
    program = Program(code, "c++", ProgramOptions(arch=arch, define_macro=macros or None, **_OPTIONS))
    try:
        return bytes(program.compile("cubin").code)
    except Exception as error:  # cuda-core keeps the type of its errors, which carry the log, to itself
        names = ", ".join(name for name, _ in texts)
        raise RuntimeError(f"{names} for {arch}, with {defines}: {error}") from error
    finally:
        program.close()


class Kernel:
    """One kernel on one device, ready to be launched; `Kernel.load` makes it.

    The kernel takes a single argument, a struct by value.
    """

    __slots__ = (
        "_can_be_early",
        "_context",
        "_current_device",
        "_function",
        "_launch",
        "_launch_early",
        "_stream",
        "device",
        "entry",
        "shared_bytes",
    )

    @classmethod
    def load(cls, sources, defines, entry, shared_bytes=0, device=None):
        """The kernel named `entry` (extern "C") of these sources, compiled for `device` (an index).

        device : default: the current one
        shared_bytes : dynamic shared memory a block, also above 48 KB

        Kept for the life of the process: later calls cost a look in a dictionary, and read no source again.
        RuntimeError if the sources do not compile, have no such kernel, or the device lacks the memory.
        """
        if device is None:
            device = torch.cuda.current_device()
        key = (device, tuple(sources), tuple(defines.items()), entry, shared_bytes)
        kernel = _kernels.get(key)
        if kernel is None:
            with _lock:
                kernel = _kernels.get(key)
                if kernel is None:
                    cubin = compile_cubin(sources, defines, architecture(device))
                    kernel = _kernels[key] = cls(cubin, entry, shared_bytes, device)
        return kernel

    def __init__(self, cubin, entry, shared_bytes, device):
        from cuda.bindings import driver

        torch.cuda.init()
        self.device, self.entry, self.shared_bytes = device, entry, shared_bytes
        self._launch, self._launch_early = driver.cuLaunchKernel, driver.cuLaunchKernelEx
        self._current_device = torch._C._cuda_getDevice
        self._stream = torch._C._cuda_getCurrentRawStream
        self._context = _primary_context(device)
        self._can_be_early = torch.cuda.get_device_capability(device) >= (9, 0)
        what = f"loading {entry} on cuda:{device}"
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with _active(self._context), _allowed_in_capture():
            module = _checked(driver.cuModuleLoadData(cubin), what)
            found = driver.cuModuleGetFunction(module, entry.encode())
            if found[0]:
                what += f" (the sources have {', '.join(registers_and_spills(cubin))})"
            self._function = _checked(found, what)
            dynamic = driver.cuFuncSetAttribute(self._function, limit, shared_bytes)
            _checked(dynamic, f"{what}: {shared_bytes} bytes of shared memory a block")

    def launch(self, grid, threads, params, stream=None, cooperative=False, early=False):
        """Put `grid` blocks (1 to 2^31 - 1) of `threads` threads onto a stream of the kernel's device.

        params : ctypes.Structure, copied before this returns; it has to match the kernel's struct
        stream : cudaStream_t as an integer; default: torch's current stream of that device
        cooperative : all blocks are on the chip at the same time, so that they can wait for each other
        early : where the device can (compute capability 9.0), it begins while the kernel before it ends.
            It has to wait for that one itself, as take_turn in cuda_machine.cuh does.

        RuntimeError if the launch is refused. What goes wrong later, on the GPU, torch reports.
        """
        if stream is None:
            stream = self._stream(self.device)
        # An array of its own for each call: the driver reads it while other threads may run.
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        argument = ctypes.addressof(pointer)
        if cooperative:
            return self._launch_together(grid, threads, argument, stream)
        early = early and self._can_be_early
        if self._current_device() == self.device:
            code = self._put(grid, threads, argument, stream, early)
            if not code:
                return
            if code != 201:  # CUDA_ERROR_INVALID_CONTEXT: this thread has not used CUDA yet
                self._refused(code, grid, threads)
        with _active(self._context):
            code = self._put(grid, threads, argument, stream, early)
        if code:
            self._refused(code, grid, threads)

    def _put(self, grid, threads, argument, stream, early):
        """The driver's code."""
        if early:
            how = _early(grid, threads, self.shared_bytes, stream)
            return self._launch_early(how, self._function, argument, 0)[0]
        shape = (grid, 1, 1, threads, 1, 1, self.shared_bytes)
        return self._launch(self._function, *shape, stream, argument, 0)[0]

    def _launch_together(self, grid, threads, argument, stream):
        from cuda.bindings import driver

        shape = (grid, 1, 1, threads, 1, 1, self.shared_bytes)
        with _active(self._context):
            (code,) = driver.cuLaunchCooperativeKernel(self._function, *shape, stream, argument)
        if code:
            self._refused(code, grid, threads)

    def _refused(self, code, grid, threads):
        what = f"{grid} blocks of {threads} threads with {self.shared_bytes} bytes of dynamic shared memory"
        _checked((code,), f"launching {self.entry} on cuda:{self.device}, {what}")


@functools.lru_cache(maxsize=4096)
def _early(grid, threads, shared_bytes, stream):
    """The configuration of a launch that need not wait for the end of the kernel before it."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    config.attrs, config.numAttrs = [attribute], 1
    return config


@contextlib.contextmanager
def _active(context):
    """Make a context this thread's current one for a while."""
    from cuda.bindings import driver

    _checked(driver.cuCtxPushCurrent(context), "cuCtxPushCurrent")
    try:
        yield
    finally:
        driver.cuCtxPopCurrent()


@contextlib.contextmanager
def _allowed_in_capture():
    """Let this thread load a module also while a stream is being captured into a graph."""
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    mode = _checked(driver.cuThreadExchangeStreamCaptureMode(relaxed), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)


def _primary_context(device):
    from cuda.bindings import driver

    with _lock:
        if device not in _contexts:
            what = f"the context of cuda:{device}"
            _checked(driver.cuInit(0), what)
            ordinal = _checked(driver.cuDeviceGet(device), what)
            _contexts[device] = _checked(driver.cuDevicePrimaryCtxRetain(ordinal), what)
        return _contexts[device]


def _checked(result, what):
    """The values of a call of the bindings; RuntimeError with the driver's words if it failed."""
    code, *values = result
    if code:
        from cuda.bindings import driver, nvrtc

        if isinstance(code, nvrtc.nvrtcResult):
            text = nvrtc.nvrtcGetErrorString(code)[1]
        else:
            text = driver.cuGetErrorString(code)[1]
        text = text.decode() if text else "an error without a name"
        raise RuntimeError(f"{what}: {text} ({getattr(code, 'name', code)})")
    return values[0] if len(values) == 1 else values
