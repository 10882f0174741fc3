"""What `python -m mamba_ref.compare` prints and draws."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mamba_ref import compare_measure as measure
from mamba_ref.inspect import trace


@dataclass(frozen=True)
class Result:
    """What came of one backend: its rows, its figure, and what it raised (each may be missing)."""

    backend: str | None
    rows: list
    path: Path | None
    problem: str | None

    @property
    def bad(self):
        return [row.name for row in self.rows if not row.ok]


def draw(args, section, candidate, inputs, text, rows):
    """Save the figure of Δ, one channel's state and both outputs; returns its path."""
    from mamba_ref import plots  # matplotlib is slow to import, and a usage error should not wait for it

    with torch.no_grad():
        y = measure.call(candidate, inputs)
    seen = trace(**measure.to_numpy(inputs), delta_softplus=True)
    labels = plots.byte_labels(text[0]) if text else None
    what = f"{args.target} ({section.backend})" if section.backend else args.target
    source = f"a seeded block reading {Path(args.text).name}" if args.text else "random inputs"
    verdict = f"relative error {rows[0].rel:.0e}, allowed {rows[0].bound:.0e}"
    path = figure_path(args, section.backend)
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.plot_comparison(seen, measure.to_numpy({"y": y})["y"], labels, what, source, verdict, path)
    return path


def figure_path(args, backend):
    """out/compare-FUNCTION[-BACKEND][-TEXT].png; or the path asked for, with the backend if several run."""
    if args.figure:
        path = Path(args.figure)
        return path.with_stem(f"{path.stem}-{backend}") if args.every_backend and backend else path
    parts = [args.target.partition(":")[2].replace(".", "-"), backend, args.text and Path(args.text).stem]
    return Path("out") / f"compare-{'-'.join(part for part in parts if part)}.png"


def sizes(shape):
    return "B {}, D {}, L {}, N {}".format(*shape)


def print_head(args, section, inputs):
    how = "in the Triton interpreter" if section.interpreted else f"on {section.device}"
    print(f"{args.target}, {f'backend {section.backend}, ' if section.backend else ''}{args.dtype} {how}")
    source = f"a seeded block reading {args.text}" if args.text else "seeded random inputs"
    print(f"  compared at {sizes((*inputs['u'].shape, inputs['A'].shape[1]))}: {source}, seed {args.seed}")
    if section.checked != section.shape:
        print(f"  (at {sizes(section.shape)} the float64 truth would be too large; that shape is timed)")


def print_rows(rows, remarks):
    print(f"\n  {'tensor':<16}{'max error':>10}{'relative':>11}{'bound':>11}")
    for row in rows:
        mark = "pass" if row.ok else f"FAIL  {row.note}".rstrip()
        print(f"  {row.name:<16}{row.max_abs:>10.1e}{row.rel:>11.1e}{row.bound:>11.1e}  {mark}")
    for remark in remarks:
        print(f"  ({remark})")
    print()


def print_times(clock):
    if isinstance(clock, str):
        print(f"  {clock}\n")
        return
    shape, reference, candidate = clock
    print(f"  {'median time':<20}{'reference':>12}{'candidate':>12}{'ratio':>9}   at {sizes(shape)}")
    for kind, slow in reference.items():
        fast = candidate[kind]
        print(f"  {kind:<20}{slow:>9.2f} ms{fast:>9.2f} ms{slow / fast:>8.1f}x")
    print()


def summary(args, results):
    """Print the last line; returns the exit code."""
    total = sum(len(result.rows) for result in results)
    names = ", ".join(result.backend for result in results if result.backend)
    wrong = [
        f"{result.backend + ': ' if result.backend else ''}{result.problem or ', '.join(result.bad)}"
        for result in results
        if result.problem or result.bad
    ]
    if wrong:
        verdict = f"does not agree with the reference ({'; '.join(wrong)})"
    else:
        verdict = f"agrees with the reference on all {total} tensors{f' ({names})' if names else ''}"
    paths = [str(result.path) for result in results if result.path]
    drawn = f"; steps, state and both outputs are drawn in {', '.join(paths)}" if paths else ""
    print(f"{args.target} {verdict}{drawn}.")
    return 1 if wrong else 0
