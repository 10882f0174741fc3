"""Speed over length and over batch size: the scan beside what it replaces, Mamba beside a Transformer.

Paper: figure 8, section 4.5, appendix E.5, on an A100 80GB PCIe. Left: batch 1, D = 1024, N = 16, bfloat16,
forward; it prints no numbers of single points. Right: prompt 2048, 128 new tokens, float16.
"""

import functools

import torch
from torch import fft

from mamba_fast.bench import attention, generation
from mamba_fast.bench.case import Case, Kernel
from mamba_fast.bench.measure import rows_of  # fmt: skip
from mamba_fast.bench.measure import run as measure
from mamba_fast.bench.scan import inputs, ours, scan_case
from mamba_fast.bench.timing import speeds
from mamba_fast.ops.selective_scan import selective_scan_fn
from mamba_fast.reproduce import report

TITLE = "Time over length, and tokens a second over batch size"
LONG = [2**18, 2**19]  # where attention alone would take most of the time
UNFUSED = 2**15  # the longest whose states, (D, L, N) in float32, are written to memory
MODELS = {"random:mamba-1.4b": "Mamba 1.4B", "random:pythia-1.4b": "Pythia 1.4B"}
QUICK = {"random:mamba-64x2": "Mamba, width 64", "random:pythia-64x2": "Pythia, width 64"}
CLAIMS = (
    "paper: the scan is faster than FlashAttention-2 beyond 2k tokens, 7x at 32k, 20 to 40x an unfused scan",
    "paper: 4 to 5x the throughput of a Transformer of similar size",
)


def run(options):
    """Left panel: rows {"length", way: ms, ...}; right: `throughput` {"model", "batch", "tokens_per_s"}."""
    rows = time_over_length(options.device)
    throughput = []
    for row in tokens_a_second(options):
        throughput.append(row)
        yield {"findings": [*CLAIMS, *findings(rows, throughput)], "rows": rows, "throughput": throughput}


def time_over_length(device):
    """The scan and attention, checked as in the bench; a convolution of length L; an unfused scan."""
    gpu = device.type == "cuda"
    cases, width = attention.cases(device, False), attention.HEADS * attention.WIDTH
    dtype = cases[0].dtype
    if gpu:
        cases += [scan_case(f"L={n}", (1, width, n, 16), dtype, device, ours(device), backward=False)
                  for n in LONG]  # fmt: skip
    machine, found = measure(cases, device)
    lengths = sorted({case.shape[2] for case in cases})
    for seqlen in lengths:
        shape = (1, width, seqlen, 16)
        kernels = [Kernel("FFT convolution", long_convolution, "other")]
        if seqlen <= UNFUSED:
            plain = functools.partial(selective_scan_fn, delta_softplus=True, backend="torch")
            kernels.append(Kernel("unfused scan", plain, "other"))
        make = functools.partial(inputs, shape, dtype, device)
        case = Case(
            f"L={seqlen}", shape, dtype, make, kernels, kernels[0].run, backward=False, thorough=False
        )
        found += rows_of(case, {}, machine, device)
    named, wide = {"ours": "scan, {}", "peer": "{}", "other": "{}"}, {n: {"length": n} for n in lengths}
    for r in found:
        wide[r["shape"][2]][named[r["role"]].format(r["name"])] = r["forward"]["median"]
    return list(wide.values())


def long_convolution(u, delta, **others):
    """A global convolution y = K * u, as an LTI SSM runs it, with a kernel (D, L) of any numbers: `delta`."""
    size = 2 * u.shape[-1]
    spectrum = fft.rfft(u.float(), size) * fft.rfft(delta.float(), size)
    return fft.irfft(spectrum, size)[..., : u.shape[-1]].to(u.dtype)


def tokens_a_second(options):
    """New tokens over all of the time, prompt included; None where the memory does not suffice."""
    quick = options.quick
    lengths = ["--promptlen", "16", "--genlen", "4"] if quick else ["--promptlen", "2048", "--genlen", "128"]
    for name, shown in (QUICK if quick else MODELS).items():
        flags = ["--model-name", name, "--repeats", "2" if quick else "3", "--device", str(options.device)]
        asked = generation.parse([*flags, *lengths, "--batch", *map(str, options.batch)])
        dtype = generation.dtype_of(asked.dtype, options.device)
        found = generation.rows_of(asked, options.device, dtype, speeds(options.device))
        for batch in options.batch:
            row = {"model": shown, "batch": batch}
            try:
                yield row | {"tokens_per_s": next(found)["tokens_per_s"]}
            except torch.OutOfMemoryError:
                yield row | {"tokens_per_s": None}
                break


def findings(rows, throughput):
    """Ratios to the fastest scan at every length that the paper names, and to the Transformer."""
    lines = []
    for row in rows:
        times = {way: ms for way, ms in row.items() if way != "length"}
        best = min(ms for way, ms in times.items() if way.startswith("scan"))
        told = [f"{way} {ms / best:.2f}x" for way, ms in times.items() if not way.startswith("scan")]
        lines.append(f"{row['length']} tokens, time over the scan's: {', '.join(told)}")
    first, second = (*_by_model(throughput).values(), {}, {})[:2]
    for batch in sorted(first.keys() & second.keys()):
        if first[batch] and second[batch]:
            lines.append(
                f"batch {batch}: {first[batch] / second[batch]:.2f}x the Transformer's tokens a second"
            )
    return lines


def _by_model(throughput):
    return {
        name: {r["batch"]: r["tokens_per_s"] for r in throughput if r["model"] == name}
        for name in dict.fromkeys(r["model"] for r in throughput)
    }


def figure(plt, result):
    """Left: a curve a way of mixing tokens. Right: two bars a batch size."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4), width_ratios=[1.2, 1])
    names = list(dict.fromkeys(way for row in result["rows"] for way in row if way != "length"))
    others = iter(report.OTHERS)
    for k, name in enumerate(names):
        points = [(row["length"], row[name]) for row in result["rows"] if name in row]
        color = report.OURS if k == 0 else next(others)
        left.plot(*zip(*points, strict=True), "o-", ms=4, color=color, label=name)
    report.lengths_axis(left, [row["length"] for row in result["rows"]])
    left.set(yscale="log", xlabel="length (tokens)", ylabel="time (ms)", title="forward, width 1024, batch 1")
    left.legend(fontsize=8)
    models = _by_model(result["throughput"])
    batches = sorted({batch for points in models.values() for batch in points})
    for k, ((name, points), color) in enumerate(
        zip(models.items(), (report.OURS, report.OTHERS[1]), strict=False)
    ):
        places = [batches.index(batch) + 0.4 * (k - 0.5) for batch in points]
        bars = right.bar(places, [v or 0 for v in points.values()], 0.38, color=color, label=name)
        right.bar_label(
            bars, ["no memory" if v is None else f"{v:,.0f}" for v in points.values()], fontsize=7
        )
    right.set_xticks(range(len(batches)), batches)
    right.set(xlabel="batch size", ylabel="new tokens per second", title="generation, prompt included")
    right.legend(fontsize=8)
    return fig
