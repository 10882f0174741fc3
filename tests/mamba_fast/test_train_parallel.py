"""Training shared by processes as `parallel` says: the steps of one, and the rest of a run to the bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import CASES, KINDS, MOVED, STOPPED, TEXT, first_logits, take
from train_inputs import check_same_run, flat, tiny, write_texts

from mamba_fast import MambaLMHeadModel
from mamba_fast.train import ConfigError, Processes, Run, processes_of
from mamba_fast.train.checkpoint import load_latest
from mamba_fast.train.metrics import read_metrics
from mamba_ref.checks import bounds, check

ROOT = Path(__file__).parents[2]
RANKS = 3  # of two, the sums would not show in which order they are made
TASKS = [case for case, settings in CASES.items() if "task" in settings]
EXACT = 2.0**-40  # float64: the same sums in another order, as in test_distributed.py


def launch(base, what):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run(
        [*command, "tests/train_worker.py", str(base), what],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def write(base):
    """Documents shorter than a row, and one document."""
    write_texts(base / "texts", seed=4, documents=150, longest=18)
    write_texts(base / "one", seed=5, documents=1, longest=9000)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Where every case ran in each kind; then some runs were stopped, and rank 1 was killed in the last."""
    base = tmp_path_factory.mktemp("runs")
    write(base)
    done = launch(base, "start")
    assert "SIGKILL" in done.stderr, done.stderr
    return base


@pytest.fixture(scope="module")
def resumed(started):
    """Where others went on with what was stopped: as many, or one, or in another way."""
    for kind in (*KINDS, "one"):
        shutil.copytree(started / "stopped fsdp", started / f"fsdp to {kind}")
    one = STOPPED | {"accumulate": RANKS * STOPPED["accumulate"]}
    take(started, "whole one", one)
    with pytest.raises(KeyboardInterrupt):
        take(started, "one to fsdp", one, hooks=[interrupt])
    done = launch(started, "go on")
    assert done.returncode == 0, done.stderr
    take(started, "fsdp to one", one)
    return started


def interrupt(run, line):
    raise KeyboardInterrupt


def left(base, name):
    return load_latest(base / name / "checkpoints")[1], read_metrics(base / name / "metrics.jsonl")


def numbers(state, lines):
    """Every parameter, every state of the optimizer, and what was measured, by name."""
    found = flat({"model": state["model"], "optimizer": state["optimizer"]["state"]})
    for key in ("loss", "grad_norm", "validation_loss", "validation_accuracy"):
        measured = [line[key] for line in lines if key in line]
        if measured:
            found[key] = torch.tensor(measured, dtype=torch.float64)
    return found


def check_numbers(label, got, want, limits):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert type(got[name]) is torch.Tensor
        check(f"{label}: {name}", got[name], value, limits[name])


@pytest.mark.parametrize(
    "case, kind",
    [(case, kind) for case in CASES for kind in KINDS if case not in TASKS or kind == "sequence"],
)
def test_steps_are_those_of_one_process(started, case, kind):
    """float64 to rounding; half types within 8 times the error of one process against float64.

    One process accumulates the rows of all where each has its own.
    """
    settings = dict(CASES[case])
    pieces = settings["accumulate"] = settings.get("accumulate", 1) * (1 if kind == "sequence" else RANKS)
    half = settings.pop("dtype", None)
    take(started, f"{case} {pieces}", settings)
    want = numbers(*left(started, f"{case} {pieces}"))
    assert (want["grad_norm"] > settings.get("clip", 0)).all()  # a step is of clipped gradients
    limits = dict.fromkeys(want, EXACT)
    if half:
        take(started, f"{case} {pieces} half", settings, dtype=half)
        limits = bounds(numbers(*left(started, f"{case} {pieces} half")), want)
    check_numbers(f"{case}, {kind}", numbers(*left(started, f"{case} {kind}")), want, limits)


@pytest.mark.parametrize("case", TASKS)
def test_shards_take_the_steps_of_copies(started, case):
    """A task draws a row by where its batch begins: several processes have other rows than one."""
    want = numbers(*left(started, f"{case} ddp"))
    assert "validation_accuracy" in want
    check_numbers(case, numbers(*left(started, f"{case} fsdp")), want, dict.fromkeys(want, EXACT))


def test_logits_of_shards_need_no_loss_before_them(started):
    check("logits", torch.load(started / "logits 0.pt"), first_logits(started), EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_and_the_model_are_those_of_one_process(started, kind):
    """The same names, types and shapes; the model is the one in the checkpoint."""
    state, _ = left(started, f"bfloat16 {kind}")
    take(started, "format", CASES["bfloat16"])
    want, got = (flat(s) for s in (left(started, "format")[0], state))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert type(got[name]) is type(value), name
        if isinstance(value, torch.Tensor):
            assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype), name
    model = MambaLMHeadModel.from_pretrained(started / f"bfloat16 {kind}" / "model")
    assert all(torch.equal(v, state["model"][name]) for name, v in model.state_dict().items())


def test_cases_have_the_rows_they_are_named_for(tmp_path):
    write(tmp_path)
    for folder, packed in (("texts", True), ("one", False)):
        run = Run(tiny(tmp_path, seqlen=23, data={"folder": str(tmp_path / folder)}))
        assert run.data.train.count > 20
        assert all((run.data.next().seq_idx is not None) == packed for _ in range(8))


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_started_again_it_ends_with_the_same_bits(resumed, kind):
    """Also where a process was killed: that of fsdp."""
    assert left(resumed, f"stopped {kind}")[0]["step"] == STOPPED["steps"]
    check_same_run(*left(resumed, f"stopped {kind}"), *left(resumed, f"whole {kind}"))


@pytest.mark.parametrize("name", [*(f"fsdp to {kind}" for kind in (*MOVED, "one")), "one to fsdp"])
def test_other_processes_go_on_with_a_run(resumed, name):
    """From three with shards to three of each kind and to one, and back: the steps of one process."""
    want = numbers(*left(resumed, "whole one"))
    check_numbers(name, numbers(*left(resumed, name)), want, dict.fromkeys(want, EXACT))


def test_other_rows_a_step_do_not_go_on_with_a_run(tmp_path):
    write(tmp_path)
    take(tmp_path, "run", TEXT)
    two = Processes(0, 2)
    with pytest.raises(
        ConfigError, match=r"^batch_size, accumulate: the run in .* takes 2 rows .*, got 4 with 2"
    ):
        take(tmp_path, "run", TEXT, lambda config: two)
    with pytest.raises(ConfigError, match=r"^accumulate: the run in .* has 2, got 3"):
        take(tmp_path, "run", TEXT, accumulate=3)
    take(tmp_path, "run", TEXT, lambda config: two, accumulate=1)


def test_errors_name_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match=r"^seqlen: expected a token for each of 4 .* 'sequence', got 3"):
        processes_of(tiny(tmp_path, seqlen=3, parallel="sequence"))
    config = tiny(tmp_path, task="induction", graph=True, device="cuda")
    with pytest.raises(ConfigError, match=r"^graph: expected false with several processes, got true on 4"):
        Run(config, processes=processes_of(config))
