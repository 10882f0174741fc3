"""Two and four processes against one: outputs, and every gradient. They talk through gloo, on a CPU."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from split_cases import CASES, CONFIG, block, model_of, run, step

from mamba_ref.checks import bounds, check

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text("utf-8")
EXACT = (
    2.0**-40
)  # float64: the same sums in another order, some hundred roundings, and softmax of small models


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """Every part that each of 2 or 4 processes has computed: ranks(name) is a list, one entry a rank."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={request.param}", "tests/split_worker.py", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr

    def parts(name):
        return [torch.load(out / f"{name} {r}.pt", weights_only=False) for r in range(request.param)]

    parts.count = request.param
    return parts


def joined(parts):
    """Logits side by side; everything else is a share of a sum."""
    return {
        name: torch.cat([p[name] for p in parts], 1) if name == "logits" else sum(p[name] for p in parts)
        for name in parts[0]
    }


@pytest.mark.parametrize("name", CASES)
def test_a_split_sequence_is_the_sequence(ranks, name):
    """In float64 to rounding; in float32 within 8 times the error of one process."""
    if CASES[name].seqlen < ranks.count:
        pytest.skip("fewer tokens than processes")
    want, plain = run(CASES[name], torch.float64), run(CASES[name], torch.float32)
    exact, got = (joined(ranks(f"{name} {dtype}")) for dtype in (torch.float64, torch.float32))
    limits = bounds(plain, want)
    assert got.keys() == want.keys() == exact.keys()
    for key, value in want.items():
        assert value.abs().max() > 0, key
        check(f"{name}: {key}, float64", exact[key], value, EXACT)
        check(f"{name}: {key}", got[key], value, limits[key])


def test_a_block_alone(ranks):
    got = joined(ranks("block"))
    for name, value in block().items():
        check(name, got[name], value, EXACT)


def test_what_a_rank_sends(ranks):
    """The formulas of docs/scaling.md, in bytes; in the order of the calls, backward last layer first."""
    B, D, K, N, w = CASES["uneven slices"].batch, 2 * CONFIG.d_model, 4, CONFIG.ssm_cfg["d_state"], 4
    rows = re.findall(r"\| \w+, [\w ]+ \| ([\w-]+) \| `([^`]+)` \|", PAGE)
    assert len(rows) == 4
    sizes = {"B": B, "D": D, "K": K, "N": N, "w": w}
    call = [(name.replace("-", "_"), eval(formula, {}, sizes)) for name, formula in rows]
    for sent in ranks("sent"):
        assert sent == call[:2] * CONFIG.n_layer + call[2:] * CONFIG.n_layer


@pytest.mark.parametrize("how", ["ddp", "fsdp", "ddp and sequence", "fsdp and sequence"])
def test_steps_of_ddp_and_fsdp2_are_steps_of_one_process(ranks, how):
    """Rows over processes, with and without tokens of a row over pairs of them: two steps of AdamW."""
    model = step(torch.float64)
    for found in ranks(how):
        for name, p in model.named_parameters():
            check(f"{name}", found[name], p, EXACT)
            check(f"d{name}", found[f"d{name}"], p.grad, 1e3 * EXACT)  # at parameters that differ by EXACT


def test_the_state_dict_of_many_is_that_of_one(ranks):
    model = step(torch.float64)
    for how in ("ddp", "fsdp"):
        whole, *others = ranks(f"{how} state dict")
        assert whole.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            check(name, whole[name], value, EXACT)
        if how == "fsdp":
            assert not any(others)


def test_shards_under_autocast(ranks):
    """Float32 shards, bfloat16 products, checkpoints, a sequence over pairs: within 8 times one process."""
    want, plain = step(torch.float64), step(torch.float32, autocast=True)
    want, plain = ({n: p.grad for n, p in m.named_parameters()} for m in (want, plain))
    parameters = sum(p.numel() for p in model_of(torch.float32).parameters())
    shards = ranks("autocast")
    assert parameters <= sum(s["local"] for s in shards) < 1.2 * parameters
    for s in shards:
        assert s["dtypes"] == {torch.float32}
        assert s["marks"] == [True] * CONFIG.n_layer
        for name, limit in bounds(plain, want).items():
            check(name, s["found"][f"d{name}"], want[name], limit)


def test_the_plan_prints_its_table():
    section = r"<!-- plan -->\n```python\n(.*?)```\n\n(.*?)\n<!-- /plan -->"
    ((code, table),) = re.findall(section, PAGE, re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "scaling.md", "exec"), {})
    assert out.getvalue().splitlines() == table.splitlines()[2:]


def test_the_plans_scan_is_the_measured_one():
    rows = json.loads((ROOT / "docs" / "results" / "scan-nvidia-h200.json").read_text("utf-8"))["rows"]
    (row,) = (r for r in rows if (r["case"], r["name"], r["dtype"]) == ("130m_train", "cuda", "bfloat16"))
    batch, channels, seqlen, _ = row["shape"]
    (constants,) = re.findall(r"FORWARD, BACKWARD = (\S+), (\S+) ", PAGE)
    for constant, name in zip(constants, ("forward_training", "backward"), strict=True):
        assert f"{row[name]['median'] * 1e-3 / (batch * channels * seqlen):.2e}" == constant
