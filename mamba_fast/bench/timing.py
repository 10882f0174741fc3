"""Time on a device: what the clock must not see is kept out of it."""

import functools
import statistics
import subprocess
import time

import torch

EXPONENTIALS_A_CLOCK = 16  # results of the special function units of one multiprocessor


def device_ms(prepare, device, repeats=30, budget_ms=400):
    """Median and 10th to 90th percentile in milliseconds of one piece of work, with a cold cache.

    prepare() returns the same work as several functions, each on inputs of its own, which together
    exceed the second-level cache: nobody finds its inputs there. (Overwriting the cache instead would
    leave it full of unwritten lines, and the work would pay for writing them.) On a GPU, all of it is one
    CUDA graph, so that launching from Python is not counted. On a CPU: wall clock of the first function.
    """
    if device.type == "cuda":
        spent = _gpu_times(prepare, repeats, budget_ms)
    else:
        spent = wall_ms(prepare()[0], repeats, budget_ms)
    return _spread(spent)


def _spread(spent):
    spent = spent * 2 if len(spent) == 1 else spent  # one time has no spread
    cuts = statistics.quantiles(spent, n=10, method="inclusive")
    return {"median": statistics.median(spent), "p10": cuts[0], "p90": cuts[-1]}


def in_turn(calls, device, repeats=20, budget_ms=6000):
    """{name: median and spread in ms} of `calls` by name: wall clock, until the device is done.

    They take turns, so that what else the machine does meets all of them. A call whose time is spent sits
    out after three turns. The first turn warms up and does not count.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    spent = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, times in spent.items():
            if turn < 3 or sum(times) < budget_ms:
                wait()
                start = time.perf_counter()
                calls[name]()
                wait()
                times.append(1e3 * (time.perf_counter() - start))
    return {name: _spread(times[1:]) for name, times in spent.items()}


_side_stream = functools.cache(torch.cuda.Stream)  # one for all: freed memory stays with its stream


def _gpu_times(prepare, repeats, budget_ms):
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a backward runs on the stream of its forward: also that is prepared here
        works = prepare()
        for work in (works[0], works[-1]):  # compilation and lazy initialisation happen before the capture
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = [work() for work in works]  # results that live side by side are written to cold memory
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    spent = []
    while len(spent) < 7 + 2 or (len(spent) < repeats + 2 and sum(spent) * len(works) < budget_ms):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end) / len(works))
    del kept
    graph.reset()
    return spent[2:]  # the first two warm up clocks and caches


def wall_ms(work, repeats=30, budget_ms=400, wait=lambda: None):
    """Wall-clock times of work(), each begun after wait()."""
    work()
    spent = []
    while len(spent) < 3 or (len(spent) < repeats and sum(spent) < budget_ms):
        wait()
        start = time.perf_counter()
        work()
        spent.append(1e3 * (time.perf_counter() - start))
    return spent


def host_ms(work):
    """Median milliseconds that Python needs to launch work() on a GPU, without waiting for it."""
    found = statistics.median(wall_ms(work, wait=torch.cuda.synchronize))
    torch.cuda.synchronize()
    return found


def peak_extra_bytes(work):
    """The most memory on the GPU that work() holds at a time beyond what is there before and without it."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(work):
    """The most memory on the GPU while work() runs, with what was there before."""
    return peak_extra_bytes(work) + torch.cuda.memory_allocated()


def speeds(device):
    """What limits are made of: bytes a second of a copy (read + written), exponentials a second."""
    gpu = device.type == "cuda"
    source = torch.ones(2**28 if gpu else 2**24, device=device)  # 1 GiB or 64 MiB
    target = torch.empty_like(source)
    # By a kernel: the copy engine that a graph takes for `copy_` is slower.
    copy = device_ms(lambda: [lambda: torch.neg(source, out=target)], device, budget_ms=100)
    found = {"copy_bytes_per_s": 2 * source.numel() * source.element_size() / (1e-3 * copy["median"])}
    if gpu:
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        found["exponentials_per_s"] = EXPONENTIALS_A_CLOCK * multiprocessors * clock_hz(device)
    return found


def clock_hz(device):
    """The highest clock of the multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    if hasattr(properties, "clock_rate"):
        return 1e3 * properties.clock_rate
    query = ["nvidia-smi", f"--id=GPU-{properties.uuid}", "--query-gpu=clocks.max.sm"]
    done = subprocess.run(
        [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
    )
    return 1e6 * float(done.stdout)


def limit_ms(work, speeds):
    """The least time of `work` (bytes, exponentials): both go on at once, so the longer one counts."""
    bytes_moved, exponentials = work
    seconds = bytes_moved / speeds["copy_bytes_per_s"]
    if "exponentials_per_s" in speeds:
        seconds = max(seconds, exponentials / speeds["exponentials_per_s"])
    return 1e3 * seconds
