"""A run that is killed and started again is, to the bit, the run that was not."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from train_inputs import check_same_run, tiny, write_texts

from mamba_fast.train import ConfigError, Run, train
from mamba_fast.train.checkpoint import load_latest
from mamba_fast.train.metrics import read_metrics
from mamba_ref.checks import bounds, check

ROOT = Path(__file__).parents[2]
SETTINGS = dict(
    steps=24, save_every=3, accumulate=2, warmup=5, schedule="cosine", eval_every=8, eval_batches=2, clip=0.5
)


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes have: another number of threads may add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def command(config):
    """The command line of a configuration, by flags alone."""
    settings = asdict(config)
    pairs = [f"{k}.{n}={json.dumps(v)}" for k in ("model", "data") for n, v in settings.pop(k).items()]
    pairs += [f"{k}={json.dumps(v)}" for k, v in settings.items()]
    return [sys.executable, "-m", "mamba_fast.train", "--set", *pairs]


def start(config):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(config), cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def kill_at(config, line, rng):
    """Start the run and kill it a moment after that many lines of metrics; what it had written by then."""
    process, path = start(config), Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while len(read_metrics(path)) < line and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(rng.random() * 0.05)
    process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, 1), err  # killed, neither ended nor failed
    return read_metrics(path)


def finish(config):
    process = start(config)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err


def result(out):
    path, state = load_latest(out / "checkpoints")
    assert path.name == f"step-{SETTINGS['steps']:08d}.pt"
    return state, read_metrics(out / "metrics.jsonl")


@pytest.mark.parametrize("dtype, damaged", [("float32", False), ("bfloat16", True)])
def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path, dtype, damaged):
    """Also where the latest checkpoint is half a file: it is named, and the one before it used."""
    write_texts(tmp_path / "texts", seed=1)
    whole, killed = (
        tiny(tmp_path, out=str(tmp_path / name), dtype=dtype, **SETTINGS) for name in ("whole", "killed")
    )
    train(whole)
    rng, out = random.Random(dtype), Path(killed.out)
    written = kill_at(killed, rng.randint(7, 16), rng)
    step, path = load_latest(out / "checkpoints")[1]["step"], load_latest(out / "checkpoints")[0]
    if damaged:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.warns(UserWarning, match=f"{path.name}: truncated"):
            train(killed)
        step -= SETTINGS["save_every"]
    else:
        finish(killed)
    before = [line for line in written if line["step"] <= step]
    assert len(before) == step > 0
    state, lines = result(out)
    assert lines[: len(before)] == before  # with its times: these steps were not taken again
    assert [line["step"] for line in lines] == list(range(1, SETTINGS["steps"] + 1))
    check_same_run(state, lines, *result(Path(whole.out)))


@pytest.mark.parametrize("change", [{"lr": 0.02}, {"batch_size": 3}, {"model": {"d_model": 16}}])
def test_other_settings_do_not_go_on_with_a_run(tmp_path, change):
    write_texts(tmp_path / "texts")
    train(tiny(tmp_path))
    with pytest.raises(ConfigError, match=f"^{next(iter(change))}: the run in .* has .* got"):
        train(tiny(tmp_path, **change))
    train(tiny(tmp_path, log_every=5))


def test_other_texts_do_not_go_on_with_a_run(tmp_path):
    write_texts(tmp_path / "texts")
    train(tiny(tmp_path))
    (tmp_path / "texts" / "more.txt").write_text("more")
    with pytest.raises(ConfigError, match=r"^data: the run in .* was trained on other files"):
        train(tiny(tmp_path))


def test_a_run_that_has_ended_takes_no_more_steps(tmp_path):
    write_texts(tmp_path / "texts")
    first = train(tiny(tmp_path))
    again = train(tiny(tmp_path))
    assert again.metrics == first.metrics  # with its times
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu_the_rest_of_a_run_has_the_same_bits(tmp_path, graph):
    """Stopped by a hook at step 20 and gone on from the checkpoint of step 15, like a killed process."""
    changes = dict(
        task="induction", device="cuda", backend="", graph=graph, dtype="bfloat16", steps=24, save_every=15,
        eval_every=20, warmup=5, schedule="cosine", seqlen=64,
    )  # fmt: skip
    whole = tiny(tmp_path, out=str(tmp_path / "whole"), **changes)
    train(whole)
    killed = tiny(tmp_path, out=str(tmp_path / "killed"), **changes)
    train(killed, hooks=[lambda run, line: True])
    (Path(killed.out) / "checkpoints" / "step-00000020.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-00000020.pt"):
        train(killed)
    check_same_run(*result(Path(killed.out)), *result(Path(whole.out)))


@pytest.mark.parametrize("kind", ["fsdp", "sequence"])  # copies are in test_train_parallel.py
def test_two_processes_take_the_steps_of_one(tmp_path, kind):
    """torchrun with two ranks: what one process gets from the batches of both, accumulated."""
    write_texts(tmp_path / "texts", seed=2)
    config = tiny(tmp_path, out=str(tmp_path / "two"), save_every=2, parallel=kind)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command(config)[1:]], cwd=ROOT, env=env, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().count("steps") == 1  # rank 0 alone tells
    one = tiny(tmp_path, accumulate=1 if kind == "sequence" else 2)
    plain = dict(train(one).model.named_parameters())
    exact = tiny(tmp_path, out=str(tmp_path / "exact"), accumulate=one.accumulate)
    model = Run(exact).model.double()  # the same weights: they come from the seed
    want = dict(train(exact, model=model).model.named_parameters())
    _, state = load_latest(tmp_path / "two" / "checkpoints")
    for name, limit in bounds(plain, want).items():
        check(name, state["model"][name], want[name], limit)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "run")]
    assert [sum(line["tokens_per_s"] > 0 for line in found) for found in lines] == [config.steps] * 2
