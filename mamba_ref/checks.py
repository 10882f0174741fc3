"""How far apart are two tensors, how far may they be, and a table of the claims that were checked.

A bound is never chosen by hand. It is K times the error that plain PyTorch makes at the same
precision on the same inputs, plus a floor of a few roundings (docs/numerics.md).
"""

from dataclasses import dataclass

import numpy as np
import torch

K = 8  # a GPU's fast exponential is good to 2^-22, a library's to about 2^-24; the rest is room for sums
FLOOR = 4  # and this many roundings of the result's own type


@dataclass(frozen=True)
class Row:
    """One checked claim: errors measured, bound allowed."""

    name: str
    max_abs: float
    rel: float
    bound: float

    @property
    def ok(self):
        return self.rel <= self.bound < np.inf  # a NaN or infinite error is never within a bound

    def __str__(self):
        mark = "pass" if self.ok else "FAIL"
        numbers = f"max {self.max_abs:8.1e}  rel {self.rel:8.1e}  bound {self.bound:8.1e}"
        return f"{self.name:<44} {numbers}  {mark}"


def errors(got, want):
    """Max error and relative error ||got - want|| / ||want||, computed in float64.

    The relative error falls back to ||got|| when want is all zero. Shapes must be equal; a NaN or
    an infinity in `got` that `want` does not hold at the same place makes both errors infinite.
    """
    got, want = to_numpy(got), to_numpy(want)
    if got.shape != want.shape:
        raise ValueError(f"got: shape {got.shape} cannot be compared with want of shape {want.shape}")
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    if not np.isfinite(got[~same]).all() or not np.isfinite(want[~same]).all():
        return np.inf, np.inf
    diff = np.abs(np.where(same, 0, got - np.where(same, 0, want)))
    scale = np.linalg.norm(np.where(np.isfinite(want), want, 0).ravel())
    norm = np.linalg.norm(diff.ravel())
    return float(diff.max(initial=0.0)), float(norm / scale if scale else norm)


def bound(plain, want, dtype=None):
    """The relative error allowed: K times that of `plain` (plain PyTorch), plus a floor.

    The floor is FLOOR unit roundoffs of `dtype` (default: plain's own type), so that an exact
    plain result does not ask for an exact competitor.
    """
    if dtype is None:
        dtype = (
            plain.dtype
            if isinstance(plain, torch.Tensor)
            else torch.from_numpy(np.empty(0, plain.dtype)).dtype
        )
    return K * errors(plain, want)[1] + FLOOR * torch.finfo(dtype).eps / 2


def bounds(plain, want):
    """Bounds by name for all tensors of one computation: dicts of `plain` results and of the truth.

    As :func:`bound`, but the error of plain PyTorch on a tensor counts as at least the root mean
    square of its errors on all tensors of the same type: a few sums can be right by luck, and luck
    is not to be asked of anybody else.
    """
    found = {name: errors(plain[name], want[name])[1] for name in plain}
    limits = {}
    for name, tensor in plain.items():
        peers = [found[other] for other in plain if plain[other].dtype == tensor.dtype]
        usual = float(np.sqrt(np.mean(np.square(peers))))
        limits[name] = K * max(found[name], usual) + FLOOR * torch.finfo(tensor.dtype).eps / 2
    return limits


class Claims:
    """Collects checks and prints them as one table; `check` prints a line and raises when it fails."""

    def __init__(self):
        self.rows = []

    def check(self, name, got, want, bound):
        row = Row(name, *errors(got, want), float(bound))
        self.rows.append(row)
        print(row)
        if not row.ok:
            raise AssertionError(f"{name}: relative error {row.rel:.2e} is above the bound {row.bound:.2e}")

    def table(self):
        """A Markdown table of every claim checked so far."""
        head = "| claim | max error | relative error | bound |\n|---|---|---|---|"
        lines = [f"| {r.name} | {r.max_abs:.1e} | {r.rel:.1e} | {r.bound:.1e} |" for r in self.rows]
        return "\n".join([head, *lines])


_claims = Claims()


def check(claim, got, want, bound):
    """Print one line (claim, max error, relative error, bound) and raise AssertionError if it fails.

    `got` and `want` are arrays, tensors or numbers of equal shape. The bound is on the relative
    error ||got - want|| / ||want||; use 0 for bitwise equality.
    """
    _claims.check(claim, got, want, bound)


def claims_table():
    """The Markdown table of everything `check` has verified in this process."""
    return _claims.table()


def to_numpy(x):
    """A tensor, array or number as float64 or complex128 NumPy, so that errors carry no rounding."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.to(torch.complex128) if x.is_complex() else x.to(torch.float64)).numpy()
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
