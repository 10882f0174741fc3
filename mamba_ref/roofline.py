"""How fast could a scan be, and what do measured times prove? Counts, a queue of launches, results judged.

The results are those that the benches write: docs/results/NAME-DEVICE.json.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch


class Counted:
    """A number without a value that counts the instructions it goes through, in `spent`.

    A product that is added at once costs nothing: the chip has a * b + c in one instruction. `+` in
    front keeps a product, because it is needed twice.
    """

    spent: ClassVar = Counter()

    def __init__(self, product=False):
        self.product = product

    def __mul__(self, other):
        self.spent["a * b"] += 1
        return Counted(product=True)

    def __add__(self, other):
        fused = self.product or other.product
        self.spent["a * b"] -= fused
        self.spent["a * b + c" if fused else "a + b"] += 1
        return Counted()

    def __pos__(self):
        return Counted()

    def exp(self):
        self.spent["exp"] += 1
        return Counted()


def count(step, arguments):
    """{instruction: how often} of step(*numbers), given how many numbers it takes."""
    Counted.spent.clear()
    step(*(Counted() for _ in range(arguments)))
    return {name: times for name, times in sorted(Counted.spent.items()) if times}


def step_forward(h, y, Delta, Du, A, B, C):
    """One (b, d, t, n): the state after the token, and the output with its share added."""
    h = (Delta * A).exp() * h + Du * B
    return h, y + C * h


def step_backward(h, flow, Delta, Du, dp, A, B, C, write, forget, dA, dB, dC, y):
    """One (b, d, t, n) back: h is the state before the token, flow what reaches it from the next one.

    Returns the flow to the token before, and six sums with their shares added: du and ddelta are made
    of `write` and `forget`, dz of y.
    """
    A_bar = (Delta * A).exp()
    decayed = +(A_bar * h)
    h = decayed + Du * B
    g = C * dp + flow
    through = +(g * decayed)
    sums = write + g * B, forget + through * A, dA + through * Delta, dB + g * Du, dC + dp * h, y + C * h
    return A_bar * g, *sums


def walk(u, Delta, A, B, C, dy):
    """y, dA and dB of one sequence by the two steps above, on tensors: u, Delta, dy (D, L), B, C (N, L)."""
    tokens = list(zip(Delta.T[..., None], (Delta * u).T[..., None], dy.T[..., None], B.T, C.T, strict=True))
    zero = torch.zeros_like(A)  # (D, N)
    states, y, flow, dA, dB = [zero], [], zero, zero, []
    for Delta_t, Du, _, B_t, C_t in tokens:
        h, terms = step_forward(states[-1], zero, Delta_t, Du, A, B_t, C_t)
        states.append(h)
        y.append(terms.sum(1))
    for h, (Delta_t, Du, dp, B_t, C_t) in zip(states[-2::-1], reversed(tokens), strict=True):
        sums = zero, zero, dA, zero, zero, zero
        flow, _, _, dA, to_B, *_ = step_backward(h, flow, Delta_t, Du, dp, A, B_t, C_t, *sums)
        dB.insert(0, to_B.sum(0))
    return {"y": torch.stack(y, 1), "dA": dA, "dB": torch.stack(dB, 1)}


def queue(launches, kernel, wait=False):
    """A host that launches, a device that computes: when each launch and each kernel begins and ends.

    launches: what each one costs the host; kernel: what each one costs the device. A kernel begins when
    it has been launched and the one before it is done. wait: the host waits for every kernel. Returns
    (n, 4): launch begins, launch ends, kernel begins, kernel ends.
    """
    host, device, spans = 0, 0, []
    for launch in launches:
        begin = max(host + launch, device)
        spans.append((host, host + launch, begin, begin + kernel))
        device = begin + kernel
        host = device if wait else host + launch
    return np.array(spans)


def read_results(folder, device):
    """{bench: result} from the files *-DEVICE.json of a folder.

    Raises ValueError for a file whose checks did not pass: a speed counts only beside them.
    """
    results = {}
    for path in sorted(Path(folder).glob(f"*-{device}.json")):
        result = json.loads(path.read_text("utf-8"))
        if result.get("checks") != "passed":
            raise ValueError(f"{path.name}: checks are {result.get('checks')!r}, only 'passed' is read")
        results[result["bench"]] = result
    return results


@dataclass(frozen=True)
class Pair:
    """Our row and the published kernel's row of one case, in one direction, and its limit in ms."""

    bench: str
    way: str
    ours: dict
    rival: dict
    limit: float

    def __str__(self):
        return f"{self.bench} {self.way}, {self.ours['case']} {self.ours['dtype']}"

    @property
    def ahead(self):
        """The rival's median over ours."""
        return self.rival[self.way]["median"] / self.ours[self.way]["median"]

    @property
    def over(self):
        """Our median over the limit."""
        return self.ours[self.way]["median"] / self.limit

    @property
    def has_host(self):
        """Was the time that Python needs for the launch recorded?"""
        return f"{self.way}_host" in self.ours

    @property
    def eager(self):
        """As `ahead`, for calls from Python one by one: each takes the host's or the device's time."""
        rival, ours = (max(r[self.way]["median"], r[f"{self.way}_host"]) for r in (self.rival, self.ours))
        return rival / ours

    @property
    def apart(self):
        """Do the two spans from the 10th to the 90th percentile leave a gap?"""
        a, b = self.ours[self.way], self.rival[self.way]
        return a["p90"] < b["p10"] or b["p90"] < a["p10"]


def pairs(timed):
    """The pairs among [(bench, row, direction, limit)]: the first row of ours in a case, and the rival's."""
    ours, rivals = {}, {}
    for bench, row, way, limit in timed:
        at = bench, row["case"], row["dtype"], way
        if row["role"] == "ours":
            ours.setdefault(at, (row, limit))
        elif row["name"] == "published":
            rivals[at] = row
    return [Pair(at[0], at[3], row, rivals[at], limit) for at, (row, limit) in ours.items() if at in rivals]


def verdicts(found):
    """[(claim, evidence, does it hold)] about pairs."""

    def least(name, among):
        worst = min(among, key=lambda pair: getattr(pair, name))
        return f"least: {getattr(worst, name):.2f} times, {worst}", getattr(worst, name) > 1

    def part(claim, holds):
        return claim, f"{sum(holds)} of {len(holds)}", all(holds)

    errors = [
        (error / pair.rival["errors"][name], f"{name}, {pair.ours['case']} {pair.ours['dtype']}")
        for pair in found for name, error in pair.ours["errors"].items() if pair.rival["errors"][name]
    ]  # fmt: skip
    most, where = max(errors)
    return [
        ("always faster than the published kernel", *least("ahead", found)),
        part("twice as fast", [pair.ahead >= 2 for pair in found]),
        part("not just noise: p10 to p90 apart", [pair.apart for pair in found]),
        ("an eager caller sees it", *least("eager", [pair for pair in found if pair.has_host])),
        ("errors no larger than the rival's", f"most: {most:.2f} times, {where}", most <= 1),
        part("within 1.5 times the limit", [pair.over <= 1.5 for pair in found]),
    ]
