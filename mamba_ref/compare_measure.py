"""What `python -m mamba_ref.compare` measures: inputs, the float64 truth, one row a tensor, and times."""

import contextlib
import inspect
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mamba_ref import checks
from mamba_ref.block import MambaBlock
from mamba_ref.checks import errors
from mamba_ref.selective_scan import selective_scan, selective_scan_numpy

TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")  # the published order
FLOAT32 = ("A", "D", "delta_bias", "initial_state")  # these stay float32 beside half-precision tokens
LOUD = 8.0  # embedding's standard deviation: makes an untrained block's delta move and its state be heard
CHECKED = 2**22  # elements of (B, D, L, N) up to which the float64 truth is affordable


@dataclass(frozen=True)
class Row:
    """One tensor of the comparison; `note` says what is wrong beyond its values."""

    name: str
    max_abs: float
    rel: float
    bound: float
    note: str = ""

    @property
    def ok(self):
        return self.rel <= self.bound < np.inf and not self.note  # a NaN error is never within a bound


def accepts(function, keyword):
    """Does this function take this keyword argument? An unreadable signature counts as no."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def random_inputs(shape, seed=0):
    """Seeded float64 arguments of `selective_scan`: step sizes and A as a new Mamba block has them.

    shape: (B, D, L, N). A is near -1 ... -N in every channel; softplus(delta_bias) is log-uniform in
    [1e-3, 1e-1] (the range of section 3.6, drawn as in the published code) and delta spreads it by a
    factor e either way. initial_state is N(0, 1/25), near the size of later states; all else N(0, 1).
    """
    batch, d_inner, seqlen, d_state = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    steps = torch.exp(torch.rand(d_inner, generator=generator, dtype=torch.float64) * np.log(100)) * 1e-3
    return {
        "u": normal(batch, d_inner, seqlen),
        "delta": normal(batch, d_inner, seqlen),
        "A": -torch.arange(1, d_state + 1) * torch.exp(normal(d_inner, d_state) / 10),
        "B": normal(batch, d_state, seqlen),
        "C": normal(batch, d_state, seqlen),
        "D": normal(d_inner),
        "z": normal(batch, d_inner, seqlen),
        "delta_bias": torch.log(torch.expm1(steps)),
        "initial_state": normal(batch, d_inner, d_state) / 5,
    }


def text_inputs(path, shape, seed=0):
    """Arguments of `selective_scan` from a seeded MambaBlock reading a file's bytes; and those bytes.

    shape: (B, D, L, N); row b reads bytes b L to (b + 1) L through a seeded byte embedding of D / 2
    numbers. At a standard deviation of 1 the skip D u makes 98 % of an untrained block's output, and
    the check would hardly see the state; LOUD mends that. The initial state is the one a first
    reading of the same bytes leaves. Raises ValueError for an odd D or a file with fewer than B
    bytes; a short file shortens L.
    """
    batch, d_inner, seqlen, d_state = shape
    data = Path(path).read_bytes()
    seqlen = min(seqlen, len(data) // batch)
    if d_inner % 2 or seqlen == 0:
        raise ValueError(
            f"--shape: got B {batch}, D {d_inner}, but a block reading {path} needs an even D and "
            f"at least B bytes (the file has {len(data)})"
        )
    torch.manual_seed(seed)
    block = MambaBlock(d_inner // 2, d_state=d_state)
    embedding = LOUD * torch.randn(256, d_inner // 2)
    text = np.frombuffer(data[: batch * seqlen], np.uint8).reshape(batch, seqlen)
    with torch.no_grad():
        inputs = block.scan_inputs(embedding[torch.from_numpy(text.copy()).long()])
    inputs = {name: inputs[name].detach().double() for name in TENSORS}
    _, last_state = selective_scan_numpy(*arguments(to_numpy(inputs)), True)
    return inputs | {"initial_state": torch.from_numpy(last_state)}, [bytes(row) for row in text]


def at_precision(inputs, dtype, device="cpu"):
    """The inputs in the types of the published contract: tokens in `dtype`, A, D, delta_bias in float32."""
    wide = torch.promote_types(dtype, torch.float32)
    return {k: v.to(device, wide if k in FLOAT32 else dtype).contiguous() for k, v in inputs.items()}


def arguments(inputs):
    """The positional arguments of the published signature, up to delta_softplus."""
    return [*(inputs[name] for name in TENSORS), True]


def to_numpy(inputs):
    return {k: v.detach().double().cpu().numpy() for k, v in inputs.items()}


def outcome(function, inputs, weights, through_state=True, forward_only=False):
    """y, last_state and every gradient of <weights[0], y> + <weights[1], last_state>, by name.

    A gradient that the function does not give is None. through_state=False leaves last_state out of
    the sum, for functions that (like the published one) ignore its gradient.
    """
    if forward_only:
        with torch.no_grad():
            return dict(zip(("y", "last_state"), call(function, inputs, True), strict=True))
    leaves = grown(inputs)
    y, last_state = call(function, leaves, True)
    ends = [(y, weights[0])] + ([(last_state, weights[1])] if through_state else [])
    ends = [(x, w.to(x)) for x, w in ends if x.requires_grad and x.shape == w.shape]
    grads = [None] * len(leaves)
    if ends:
        outputs, cotangents = zip(*ends, strict=True)
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"y": y, "last_state": last_state} | named


def grown(inputs):
    """Fresh leaves that require a gradient, so that nothing the function does in place can spread."""
    return {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}


def call(function, inputs, return_last_state=False):
    """Call with the published positional arguments; initial_state goes by keyword where it is present."""
    state = {"initial_state": inputs["initial_state"]} if "initial_state" in inputs else {}
    return function(*arguments(inputs), return_last_state, **state)


def state_gradient(function, inputs, weights):
    """Does a gradient flow through last_state? True, or a sentence that says why it is not compared.

    The published function returns last_state as if it had a gradient and then ignores it; a function
    that takes an initial_state claims more, and is held to it.
    """
    leaves = grown(inputs)
    last_state = call(function, leaves, True)[1]
    if not last_state.requires_grad:
        return "the gradient through last_state is not compared: last_state does not require one"
    if "initial_state" in inputs:
        return True
    (du,) = torch.autograd.grad(last_state, leaves["u"], weights[1].to(last_state), allow_unused=True)
    if du is not None and du.any():
        return True
    return "the gradient through last_state is not compared: the function ignores it, as published"


def compare(function, inputs, forward_only=False, seed=0, progress=lambda step: None, known=None):
    """Rows for y, last_state and every gradient of `function` against the reference, and remarks.

    inputs: tensors by name in the types of the contract (`at_precision`), initial_state only where
    the function takes it. Truth is the NumPy oracle for y and last_state and float64 autograd of the
    torch loop for the gradients, of <g, y> + <g', last_state> with seeded normal g, g'. Each bound
    is :func:`mamba_ref.checks.bounds` of the torch loop at the inputs' own precision. `known`: a dict
    that carries truth and bounds over to the next function with the same inputs. Costs two runs of
    the torch loop with autograd: 24 B D L N bytes each.
    """
    known = {} if known is None else known
    generator = torch.Generator().manual_seed(seed + 1)
    u, A = inputs["u"], inputs["A"]
    weights = [torch.randn(n, generator=generator) for n in (u.shape, (len(u), *A.shape))]
    weights = [weights[0].to(u), weights[1].to(A)]
    remarks, through_state = [], not forward_only
    if not forward_only:
        through_state = state_gradient(function, inputs, weights)
        if through_state is not True:
            remarks, through_state = [through_state], False
    options = (through_state, forward_only)
    if options not in known:
        with threads(1):  # the loop's operations are too small to share
            progress("the float64 truth")
            truth = true_outcome(inputs, weights, *options)
            progress("plain PyTorch")
            known[options] = truth, bounds(inputs, weights, truth, *options)
    truth, limits = known[options]
    progress("the candidate")
    got = outcome(function, inputs, weights, *options)
    types = {"y": u.dtype, "last_state": torch.promote_types(u.dtype, torch.float32)}
    return [row(n, got[n], truth[n], limits[n], types.get(n)) for n in truth], remarks


def true_outcome(inputs, weights, *options):
    """The outcome in float64 on the CPU: y and last_state by the oracle, gradients by autograd."""
    exact = {k: v.cpu().double() for k, v in inputs.items()}
    truth = outcome(selective_scan, exact, [w.cpu().double() for w in weights], *options)
    exact = to_numpy(exact)
    state = {"initial_state": exact.get("initial_state")}
    truth["y"], truth["last_state"] = selective_scan_numpy(*arguments(exact), True, **state)
    return truth


def bounds(inputs, weights, truth, *options):
    """Allowed relative error by tensor: `checks.bounds` of the torch loop at the precision of the inputs.

    At float64 the truth has no more digits than the loop, so its error cannot be seen: the bound is
    then that of float32, scaled by the ratio of the two unit roundoffs.
    """
    scale = 1.0
    if inputs["u"].dtype == torch.float64:
        inputs = at_precision(inputs, torch.float32, inputs["u"].device)
        truth = true_outcome(inputs, weights, *options)
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    plain = outcome(selective_scan, inputs, weights, *options)
    return {name: scale * limit for name, limit in checks.bounds(plain, truth).items()}


def row(name, got, want, limit, dtype=None):
    """One tensor judged: its values against the bound, its shape and (where given) its type."""
    if got is None:
        return Row(name, np.inf, np.inf, limit, "no gradient")
    if tuple(got.shape) != tuple(want.shape):
        return Row(name, np.inf, np.inf, limit, f"shape {tuple(got.shape)}, not {tuple(want.shape)}")
    note = f"{got.dtype}, not {dtype}".replace("torch.", "") if dtype and got.dtype != dtype else ""
    return Row(name, *errors(got, want), limit, note)


def times(function, inputs, forward_only=False):
    """Median milliseconds of {"forward": ..., "forward + backward": ...}, warmed up and synchronised.

    On a CPU each is the better of one thread and all of PyTorch's threads: many small operations, as
    in the reference loop, can be slower with more threads.
    """
    leaves = grown(inputs)
    weight = torch.ones_like(inputs["u"])

    def forward():
        with torch.no_grad():
            call(function, inputs)

    def both():
        torch.autograd.grad(call(function, leaves), list(leaves.values()), weight, allow_unused=True)

    found = {}
    for count in {1, torch.get_num_threads()} if weight.device.type == "cpu" else {torch.get_num_threads()}:
        with threads(count):
            for kind, work in {"forward": forward, "forward + backward": both}.items():
                if kind == "forward" or not forward_only:
                    found.setdefault(kind, []).append(median_ms(work, weight.device))
    return {kind: min(medians) for kind, medians in found.items()}


@contextlib.contextmanager
def threads(count):
    """Give PyTorch's CPU operations this many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def median_ms(work, device, budget=0.5, least=3, most=100):
    """Median wall-clock milliseconds of work(): a warm-up, then repeats until `budget` seconds are spent."""

    def finish():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    spent = []
    while len(spent) < least or (sum(spent) < budget and len(spent) < most):
        finish()
        start = time.perf_counter()
        work()
        finish()
        spent.append(time.perf_counter() - start)
    return 1e3 * statistics.median(spent)
