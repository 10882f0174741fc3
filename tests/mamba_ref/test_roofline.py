"""Counted instructions stand in lines that are right; a queue adds up; verdicts follow from rows."""

import json

import numpy as np
import pytest
import torch

from mamba_ref import roofline
from mamba_ref.backward import backward_from_states
from mamba_ref.checks import bounds, errors
from mamba_ref.roofline import Counted, Pair, count, queue
from mamba_ref.selective_scan import selective_scan_numpy


def test_a_product_that_is_added_is_one_instruction():
    assert count(lambda a, b, c: a * b + c, 3) == {"a * b + c": 1}
    assert count(lambda a, b, c: c + a * b, 3) == {"a * b + c": 1}
    assert count(lambda a, b, c: a * b + b * c, 3) == {"a * b": 1, "a * b + c": 1}
    assert count(lambda a, b, c: +(a * b) + c, 3) == {"a * b": 1, "a + b": 1}  # kept: needed again
    assert count(lambda a, b: (a * b).exp(), 2) == {"a * b": 1, "exp": 1}
    assert count(lambda a, b: (a + b) + a, 2) == {"a + b": 2}


def test_counts_do_not_add_up_from_one_call_to_the_next():
    for _ in range(2):
        assert count(lambda a, b: a * b, 2) == {"a * b": 1}
    assert Counted().spent is Counted.spent


@pytest.mark.parametrize("seqlen", [1, 2, 9])
def test_the_counted_lines_make_the_scan_and_its_gradients(seqlen):
    rng = np.random.default_rng(seqlen)
    wide, thin = (3, seqlen), (4, seqlen)
    u, Delta, A, B, C, dy = (rng.normal(size=size) for size in (wide, wide, (3, 4), thin, thin, wide))
    Delta, A = abs(Delta), -abs(A)
    given = {"u": u[None], "delta": Delta[None], "A": A, "B": B[None], "C": C[None]}
    y, states = selective_scan_numpy(**given, return_states=True)
    grads = backward_from_states(**given, dy=dy[None], states=states)
    want = {"y": y[0], "dA": grads["dA"], "dB": grads["dB"][0]}
    plain, got = (
        roofline.walk(*(torch.tensor(v, dtype=dtype) for v in (u, Delta, A, B, C, dy)))
        for dtype in (torch.float32, torch.float64)
    )
    for name, limit in bounds(plain, want).items():
        assert errors(got[name], want[name])[1] <= limit * 2**-29, name


def test_the_other_sums_of_a_step_back_are_its_gradients():
    """One token with a state before it, by autograd: du, ddelta, dC and the flow to the token before."""
    names = ("h", "Delta", "u", "A", "B", "C")
    rng = np.random.default_rng(0)
    leaf = {name: torch.tensor(rng.normal(), dtype=torch.float64, requires_grad=True) for name in names}
    h, Delta, u, A, B, C = leaf.values()
    dp, from_later = (torch.tensor(v, dtype=torch.float64) for v in rng.normal(size=2))
    after, y = roofline.step_forward(h, 0, Delta, Delta * u, A, B, C)
    grads = torch.autograd.grad(dp * y + from_later * after, list(leaf.values()))
    grads = dict(zip(names, grads, strict=True))
    with torch.no_grad():
        zeros = torch.zeros(6, dtype=torch.float64)
        back = roofline.step_backward(h, from_later, Delta, Delta * u, dp, A, B, C, *zeros)
    flow, write, forget, dA, dB, dC, p = back
    want = {"h": flow, "Delta": u * write + forget, "u": Delta * write, "A": dA, "B": dB, "C": dC}
    for name, value in want.items():
        torch.testing.assert_close(value.detach(), grads[name], msg=name)
    torch.testing.assert_close(p, y.detach())


def test_a_kernel_waits_for_its_launch_and_for_the_one_before():
    assert queue([10, 10], 30).tolist() == [[0, 10, 10, 40], [10, 20, 40, 70]]
    assert queue([10, 10], 3).tolist() == [[0, 10, 10, 13], [10, 20, 20, 23]]
    assert queue([10, 10], 30, wait=True).tolist() == [[0, 10, 10, 40], [40, 50, 50, 80]]
    assert queue([10, 0, 0], 3)[:, 2].tolist() == [10, 13, 16]


def test_results_of_one_device_are_read_by_bench(tmp_path):
    for bench, device in (("scan", "gpu-x"), ("conv", "gpu-x"), ("scan", "gpu-y")):
        result = {"bench": bench, "device": device, "checks": "passed"}
        (tmp_path / f"{bench}-{device}.json").write_text(json.dumps(result), "utf-8")
    results = roofline.read_results(tmp_path, "gpu-x")
    assert {bench: r["device"] for bench, r in results.items()} == {"conv": "gpu-x", "scan": "gpu-x"}


@pytest.mark.parametrize("checks", [{"checks": "failed"}, {}])
def test_a_result_without_passed_checks_is_refused(tmp_path, checks):
    (tmp_path / "scan-x.json").write_text(json.dumps({"bench": "scan"} | checks), "utf-8")
    with pytest.raises(ValueError, match=r"scan-x\.json"):
        roofline.read_results(tmp_path, "x")


def row(name, median, role="ours", case="large", error=1e-3, **more):
    time = {"median": median, "p10": 0.9 * median, "p90": 1.1 * median}
    return {"case": case, "dtype": "float32", "name": name, "role": role, "forward": time} | {
        "errors": {"y": error}, **more,
    }  # fmt: skip


def test_pairs_are_the_first_of_ours_and_the_published_one_of_a_case():
    rows = [row("cuda", 1.0), row("triton", 3.0), row("published", 2.5, "peer"), row("loop", 9.0, "other")]
    rows += [row("cuda", 1.0, case="no rival")]
    (pair,) = roofline.pairs([("scan", r, "forward", 0.5) for r in rows])
    assert pair == Pair("scan", "forward", rows[0], rows[2], 0.5)
    assert (pair.ahead, pair.over, pair.apart, pair.has_host) == (2.5, 2.0, True, False)
    assert str(pair) == "scan forward, large float32"


def verdicts(*rivalry):
    return {claim: (evidence, holds) for claim, evidence, holds in roofline.verdicts(rivalry)}


def pair(ours, rival, limit=1.0, hosts=(0.0, 0.0), errors=(1e-3, 1e-3)):
    ours = row("cuda", ours, error=errors[0], forward_host=hosts[0])
    return Pair(
        "scan",
        "forward",
        ours,
        row("published", rival, "peer", error=errors[1], forward_host=hosts[1]),
        limit,
    )


def test_every_claim_can_hold():
    assert all(holds for _, holds in verdicts(pair(1.2, 3.0), pair(1.4, 3.0)).values())


@pytest.mark.parametrize(
    ("other", "claims"),
    [
        (pair(1.2, 1.1), "always twice noise eager"),
        (pair(1.2, 1.9), "twice"),
        (pair(1.2, 1.4), "twice noise"),
        (pair(1.2, 3.0, hosts=(4.0, 2.0)), "eager"),
        (pair(1.2, 3.0, errors=(2e-3, 1e-3)), "errors"),
        (pair(1.6, 4.0), "within"),
    ],
)
def test_one_case_refutes_a_claim(other, claims):
    found = verdicts(pair(1.2, 3.0), other)
    failed = {claim for claim, (_, holds) in found.items() if not holds}
    assert len(failed) == len(claims.split())
    assert all(any(word in claim for claim in failed) for word in claims.split())
