"""Computes the tables of docs/numerics.md: python docs/numerics.py

Errors are relative, in unit roundoffs of float32 (2^-24), the largest over a million arguments where
nothing else is said. The truth is float64.
"""

import math

import numba
import numpy as np
import torch
import torch.nn.functional as F

from mamba_fast.ops.selective_scan import numba_math

UNIT = 2.0**-24  # unit roundoff of float32
MANY = 1_000_001  # arguments a row


def roundoff_table():
    """The types, and what rounding to them costs."""
    names = {"float64": "float64 input", "float32": "the state, always", "float16": "", "bfloat16": ""}
    rows = [["type", "unit roundoff", "floor of a bound", "used for"]]
    for name, use in names.items():
        unit = torch.finfo(getattr(torch, name)).eps / 2
        power = f"2^{int(math.log2(unit))}"
        rows.append([name, f"{power} = {unit:.1e}", f"{4 * unit:.1e}", use or "tokens, B, C and y"])
    return rows


def exponential_table():
    """The functions that the numba backend brings along, beside PyTorch's."""
    functions = [
        ("exp2(x)", numba_math.exp2, torch.exp2, np.exp2, (-126, 127)),
        ("softplus(x)", numba_math.softplus, F.softplus, softplus64, (-1, 1)),
        ("softplus(x)", numba_math.softplus, F.softplus, softplus64, (-20, 20)),
        ("sigmoid(x)", numba_math.sigmoid, torch.sigmoid, lambda x: 1 / (1 + np.exp(-x)), (-1, 1)),
        ("sigmoid(x)", numba_math.sigmoid, torch.sigmoid, lambda x: 1 / (1 + np.exp(-x)), (-20, 20)),
    ]
    rows = [["function", "range of x", "numba backend", "PyTorch"]]
    for name, ours, library, truth, (low, high) in functions:
        x = spread(low, high)
        want = truth(x.astype(np.float64))
        found = units(each(ours, x), want), units(library(torch.from_numpy(x)).numpy(), want)
        rows.append([f"`{name}`", f"{low} to {high}", *map(two_digits, found)])
    return rows


def decay_table():
    """exp(delta A) by one library call, and as the kernels do it: 2^(delta (A log2 e))."""
    rng = np.random.default_rng(0)
    rows = [["Δ A", "`exp(Δ A)`, PyTorch", "the same exponent for base 2, then exact", "then `exp2`, numba"]]
    for low, high in ((0, 1), (1, 4), (4, 16), (16, 64)):
        A = -rng.uniform(1, 16, MANY).astype(np.float32)
        delta = (rng.uniform(low, high, MANY) / -A).astype(np.float32)
        want = np.exp(delta.astype(np.float64) * A)
        plain = torch.exp(torch.from_numpy(delta) * torch.from_numpy(A)).numpy()
        exponent = delta * (A * numba_math.LOG2E)
        exact, ours = np.exp2(exponent.astype(np.float64)), each(numba_math.exp2, exponent)
        found = [two_digits(units(got, want)) for got in (plain, exact, ours)]
        rows.append([f"-{low} to -{high}", *found])
    return rows


def softplus_table():
    """log(1 + e^x) as written, the form of the kernels, and PyTorch's, near a few x."""
    rows = [["x", "softplus(x)", "log(1 + e^x) as written", "max(x, 0) + 2 atanh(s)", "PyTorch"]]
    for middle in (0, -4, -8, -12, -16, -20):
        x = spread(middle - 0.5, middle + 0.5)
        want = softplus64(x.astype(np.float64))
        written = np.log(np.float32(1) + np.exp(x))
        ours, library = each(numba_math.softplus, x), F.softplus(torch.from_numpy(x)).numpy()
        found = [f"{UNIT * units(got, want):.1e}" for got in (written, ours, library)]
        rows.append([f"{middle} ± 0.5", f"{softplus64(float(middle)):.1e}", *found])
    return rows


def product_table():
    """h_t = P_t sum_s x_s / P_s with P_t = a^t and x = 1: where it dies, and what is true there."""
    rows = [["A", "Δ", "a = exp(Δ A)", "1 / P is infinite from token", "h there, by division", "true h"]]
    for A, delta in ((-16, 0.1), (-4, 0.1), (-1, 0.1), (-16, 0.01)):
        a = np.full(1000, np.exp(np.float32(delta * A)))
        P = np.cumprod(a)
        with np.errstate(all="ignore"):
            infinite = np.isinf(1 / P).argmax()
            h = (P * np.cumsum(1 / P))[infinite]
        true = (1 - math.exp(delta * A * (infinite + 1))) / (1 - math.exp(delta * A))
        rows.append([f"{A}", f"{delta}", f"{a[0]:.2f}", f"{infinite + 1}", f"{h:.3g}", f"{true:.3g}"])
    return rows


def decayed_table():
    """w_t = a h_{t-1}, kept, and found again as h_t - x_t: error of 1000 tokens together."""
    rng = np.random.default_rng(0)
    rows = [["decay a", "w kept apart", "h - x"]]
    for exponent in (0.1, 1, 4, 8, 12, 16):
        a = np.exp(np.float32(-exponent))
        h, true, w = np.float32(0), 0.0, []
        for x in rng.standard_normal(1000).astype(np.float32):
            kept, true_w = a * h, float(a) * true
            h, true = kept + x, true_w + float(x)
            w.append((kept, h - x, true_w))
        kept, found, want = np.array(w, np.float64).T
        errors = [f"{np.linalg.norm(got - want) / np.linalg.norm(want):.1e}" for got in (kept, found)]
        rows.append([f"e^-{exponent:g} = {a:.1e}", *errors])
    return rows


def luck_table():
    """Relative error ||got - want|| / ||want|| of tensors whose entries are sums of 100 products."""
    rng = np.random.default_rng(0)
    rows = [["numbers in the tensor", "least of 200 draws", "median", "most"]]
    for size in (1, 4, 16, 256):
        found = []
        for _ in range(200):
            x, y = (rng.standard_normal((size, 100)).astype(np.float32) for _ in range(2))
            want = (x.astype(np.float64) * y).sum(-1)
            got = np.cumsum(x * y, -1)[:, -1]  # one after the other, in float32
            found.append(np.linalg.norm(got - want) / np.linalg.norm(want) / UNIT)
        rows.append([f"{size}", *(two_digits(np.quantile(found, q)) for q in (0, 0.5, 1))])
    return rows


def softplus64(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def spread(low, high):
    return np.linspace(low, high, MANY).astype(np.float32)


def units(got, want):
    """Largest relative error, in unit roundoffs."""
    return float(np.max(np.abs(got - want) / np.abs(want))) / UNIT


def each(function, x):
    """A compiled scalar function of the numba backend, applied to an array."""

    @numba.njit
    def loop(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    out = np.empty_like(x)
    loop(x, out)
    return out


def two_digits(value):
    return f"{float(f'{value:.2g}'):g}"


TABLES = {
    "types": roundoff_table,
    "decay": decay_table,
    "luck": luck_table,
    "softplus": softplus_table,
    "functions": exponential_table,
    "products": product_table,
    "decayed": decayed_table,
}


def markdown(rows):
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


if __name__ == "__main__":
    for name, table in TABLES.items():
        print(f"<!-- {name} -->\n{markdown(table())}\n<!-- /{name} -->\n")
