"""Time on a device: what the clock must not see is kept out of it."""

import statistics
import time

import torch

FLUSH_BYTES = 256 * 2**20  # more than any second-level cache


def device_ms(work, device, repeats=30):
    """Median and 10th to 90th percentile in milliseconds of work(), with a cold cache.

    On a GPU: the work is captured as a CUDA graph, so that the time of launching from Python is not
    counted, and the second-level cache is overwritten before every replay. On a CPU: wall clock.
    """
    spent = _gpu_times(work, repeats) if device.type == "cuda" else _cpu_times(work, repeats)
    cuts = statistics.quantiles(spent, n=10)
    return {"median": statistics.median(spent), "p10": cuts[0], "p90": cuts[-1]}


def host_ms(work, repeats=30):
    """Median milliseconds that Python needs to launch work() on a GPU, without waiting for it."""
    spent = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        spent.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(spent)


def _gpu_times(work, repeats):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation and lazy initialisation happen before the capture
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    spent = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        spent.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in spent]


def _cpu_times(work, repeats, budget=2.0):
    work()
    spent = []
    while len(spent) < 5 or (len(spent) < repeats and sum(spent) < 1e3 * budget):
        start = time.perf_counter()
        work()
        spent.append(1e3 * (time.perf_counter() - start))
    return spent
