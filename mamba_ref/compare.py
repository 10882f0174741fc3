"""Compare any implementation of the selective scan with the reference.

    python -m mamba_ref.compare mamba_fast:selective_scan_fn --backend numba
    python -m mamba_ref.compare my_kernels:my_scan --shape 1,20,65,5 --dtype bfloat16
    python -m mamba_ref.compare mamba_fast:selective_scan_fn --every-backend --text README.md

The function takes the published positional arguments (u, delta, A, B, C, D, z, delta_bias,
delta_softplus, return_last_state). Where it also takes initial_state, that and its gradient are
compared. Exit code 0: every row is within its bound. 1: a row is not, or the function raised. 2: usage.
"""

import argparse
import importlib
import math
import operator
import os
import sys
import traceback
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mamba_ref import compare_measure as measure
from mamba_ref import compare_report as report
from mamba_ref.selective_scan import selective_scan

TINY, SMALL, REAL, TEXT = (1, 4, 33, 4), (2, 64, 256, 16), (8, 1536, 2048, 16), (1, 64, 160, 16)
KNOWN = ("torch", "numba", "triton", "cuda")


class UsageError(Exception):
    """The command line asks for something that is not there."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"compare: {message}\n")


@dataclass(frozen=True)
class Section:
    """One comparison: where it runs, on what shapes, and whether the Triton interpreter does the work."""

    backend: str | None
    device: torch.device
    shape: tuple  # asked for, and timed
    checked: tuple  # compared with the float64 truth
    interpreted: bool


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is first imported
    try:
        module, function = load(args.target)
        sections = [plan(args, *where) for where in backends(args, module, function)]
        kept = {}  # inputs, truth and reference times, for the backends that share them
        with tqdm(total=len(sections), disable=None, leave=False, bar_format="{n}/{total} {desc} ...") as bar:
            results = [run_section(args, function, section, kept, bar) for section in sections]
    except UsageError as problem:
        parser.error(problem)
    return report.summary(args, results)


def build_parser():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m mamba_ref.compare", description=__doc__, formatter_class=keep_lines)
    parser.add_argument("target", metavar="MODULE:FUNCTION", help="what to compare, by the name to import")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--backend", help="passed on as backend=, e.g. torch, numba, triton, cuda")
    choice.add_argument("--every-backend", action="store_true", help="each of MODULE.available_backends()")
    parser.add_argument("--shape", type=shape, metavar="B,D,L,N", help=f"default {SMALL}; on a GPU {REAL}")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16", "float64"])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--text", metavar="FILE", help="inputs of a seeded block that reads this file")
    parser.add_argument("--forward-only", action="store_true", help="y and last_state alone: no gradients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", metavar="PATH", help="default out/compare-FUNCTION-....png")
    return parser


def shape(text):
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, but four positive sizes B,D,L,N are needed")
    return sizes


def load(target):
    """The module and the callable that MODULE:FUNCTION names. Raises UsageError when either is not there."""
    name, _, path = target.partition(":")
    if not name or not path:
        raise UsageError(f"got {target!r}, but MODULE:FUNCTION is needed, e.g. mamba_fast:selective_scan_fn")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name and (name + ".").startswith(problem.name + "."):
            raise UsageError(f"module {name!r} was not found") from None
        raise UsageError(f"module {name!r} cannot be imported: {problem}") from None
    except Exception as problem:  # the module is anyone's code
        raise UsageError(f"module {name!r} cannot be imported: {type(problem).__name__}: {problem}") from None
    try:
        function = operator.attrgetter(path)(module)
    except AttributeError:
        raise UsageError(f"module {name!r} has no {path!r}") from None
    if not callable(function):
        raise UsageError(f"{target} is a {type(function).__name__}, not a function")
    return module, function


def backends(args, module, function):
    """Pairs (backend, device) to run; backend None leaves the choice to the function."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    packages = (module, sys.modules[module.__name__.partition(".")[0]])
    offer = next((p.available_backends for p in packages if hasattr(p, "available_backends")), None)
    takes = measure.accepts(function, "backend")

    def offered(device):
        return offer(device) if measure.accepts(offer, "device") else offer()

    if args.every_backend and offer and takes:
        found = {name: device for name in offered(device)}
        if not args.device:
            found = {name: "cpu" for name in offered("cpu")} | found  # CPU backends beside GPU ones
        return list(found.items())
    if args.backend is None:
        return [(None, device)]
    if not takes:
        raise UsageError(f"--backend {args.backend}: {args.target} takes no keyword 'backend'")
    if offer and args.backend not in offered(device):
        what = f"not available on {device}" if args.backend in KNOWN else "unknown"
        raise UsageError(f"--backend {args.backend}: {what}; {args.target} has {', '.join(offered(device))}")
    return [(args.backend, device)]


def plan(args, backend, device):
    """The section of one backend: device and shapes. Raises UsageError for a device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA GPU on this machine")
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    default = TEXT if args.text else REAL if device == "cuda" else SMALL
    asked = args.shape or (TINY if interpreted else default)
    return Section(backend, torch.device(device), asked, checkable(asked), interpreted)


def bind(function, backend):
    """The candidate with its backend= filled in, and without initial_state where it takes none."""
    options = {} if backend is None else {"backend": backend}
    return lambda *args, **state: function(*args, **state, **options)


def checkable(shape):
    """The shape itself, or one with fewer rows and channels whose float64 truth is affordable."""
    batch, d_inner, seqlen, d_state = shape
    if math.prod(shape) <= measure.CHECKED:
        return shape
    batch = min(batch, 2)
    d_inner = min(d_inner, measure.CHECKED // (batch * seqlen * d_state))
    return batch, max(2, d_inner - d_inner % 2), seqlen, d_state


def run_section(args, function, section, kept, bar):
    """Compare, time and draw one backend; prints as it goes and returns a `report.Result`."""
    candidate = bind(function, section.backend)
    place = (section.checked, section.device)
    if place not in kept:
        kept[place] = (*make_inputs(args, function, section), {})
    inputs, text, known = kept[place]

    def say(step):
        bar.set_description_str(f"{section.backend}: {step}" if section.backend else step)

    def show(part, *given):
        with tqdm.external_write_mode():
            part(*given)

    show(report.print_head, args, section, inputs)
    rows = path = problem = None
    try:
        rows, remarks = measure.compare(candidate, inputs, args.forward_only, args.seed, say, known)
        show(report.print_rows, rows, remarks)
        say("times")
        show(report.print_times, timing(args, section, candidate, inputs, rows, kept))
        say("the figure")
        path = report.draw(args, section, candidate, inputs, text, rows)
    except (Exception, SystemExit) as error:  # the candidate is anyone's code: whatever it raises is a result
        show(traceback.print_exc)
        problem = f"raised {type(error).__name__}: {error}"
    show(print, f"  FAIL  {problem}\n" if problem else f"  figure  {path}\n")
    bar.update()
    return report.Result(section.backend, rows or [], path, problem)


def make_inputs(args, function, section):
    """The inputs at the precision and on the device asked for; and the bytes they come from, or None."""
    text = None
    try:
        if args.text:
            inputs, text = measure.text_inputs(args.text, section.checked, args.seed)
        else:
            inputs = measure.random_inputs(section.checked, args.seed)
    except (OSError, ValueError) as problem:
        raise UsageError(f"--text: {problem}") from None
    if not measure.accepts(function, "initial_state"):
        del inputs["initial_state"]
    return measure.at_precision(inputs, getattr(torch, args.dtype), section.device), text


def timing(args, section, candidate, inputs, rows, kept):
    """(shape, reference ms, candidate ms) by kind of call; or a sentence where times would mislead."""
    if section.interpreted:
        return "no times: the Triton interpreter shows that a kernel is correct, not how fast it is"
    if not all(row.ok for row in rows):
        return "no times: a speed counts only beside a comparison that passes"
    size = (*inputs["u"].shape, inputs["A"].shape[1])
    if section.shape != section.checked:
        size = fitting(section.shape, section.device)
        fresh = measure.random_inputs(size, args.seed)
        fresh = measure.at_precision(fresh, inputs["u"].dtype, section.device)
        inputs = {name: fresh[name] for name in inputs}
    place = (size, section.device, "reference times")
    if place not in kept:
        kept[place] = measure.times(selective_scan, inputs, args.forward_only)
    return size, kept[place], measure.times(candidate, inputs, args.forward_only)


def fitting(shape, device):
    """The shape, its batch halved until the torch loop's autograd graph fits in half the free GPU memory."""
    batch, *rest = shape
    if device.type == "cuda":
        while batch > 1 and 24 * math.prod((batch, *rest)) > torch.cuda.mem_get_info(device)[0] / 2:
            batch //= 2
    return batch, *rest


if __name__ == "__main__":
    sys.exit(main())
