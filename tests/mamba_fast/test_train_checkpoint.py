"""A checkpoint is whole or refused by name, and the one before it is there."""

import os
import random
import subprocess
import sys

import pytest
import torch

from mamba_fast import CheckpointError
from mamba_fast.train import checkpoint


def state(step):
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "model": {"w": torch.randn(500, generator=generator)}, "numbers": [1.5, None, "x"]}


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2, 30):
        checkpoint.save(tmp_path, step, state(step))
    return tmp_path


def check_state(got, step):
    assert torch.equal(got["model"]["w"], state(step)["model"]["w"])
    assert {k: v for k, v in got.items() if k != "model"} == {"step": step, "numbers": [1.5, None, "x"]}


def test_the_last_two_are_kept(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002.pt", "step-00000030.pt"]
    path, found = checkpoint.load_latest(folder)
    assert path.name == "step-00000030.pt"
    check_state(found, 30)
    check_state(checkpoint.load(folder / "step-00000002.pt"), 2)
    assert checkpoint.load_latest(folder / "nothing") is None


def whole_length(path):
    return len(path.read_bytes())


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_one_is_refused_by_name_and_the_previous_one_used(folder, part):
    path = folder / "step-00000030.pt"
    os.truncate(path, int(part * whole_length(path)))
    with pytest.raises(CheckpointError, match=r"step-00000030\.pt: truncated or no checkpoint"):
        checkpoint.load(path)
    with pytest.warns(UserWarning, match=r"step-00000030\.pt: .*; step-00000002\.pt is used"):
        used, found = checkpoint.load_latest(folder)
    assert used.name == "step-00000002.pt"
    check_state(found, 2)


def test_one_wrong_byte_is_noticed(folder):
    """In the numbers themselves: torch.load alone takes it."""
    path = folder / "step-00000030.pt"
    data = bytearray(path.read_bytes())
    place = data.find(state(30)["model"]["w"].numpy().tobytes())
    assert place > 0
    data[place + 777] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path)["model"]["w"], state(30)["model"]["w"])
    with pytest.raises(CheckpointError, match=r"step-00000030\.pt: damaged: the checksum of .*data/0"):
        checkpoint.load(path)
    with pytest.warns(UserWarning, match=r"step-00000030\.pt: damaged"):
        check_state(checkpoint.load_latest(folder)[1], 2)


def test_a_wrong_byte_anywhere_is_refused_or_does_no_harm(folder):
    """Names, sizes and flags at both ends of the file, which no checksum covers."""
    path = folder / "step-00000030.pt"
    data, refused = path.read_bytes(), 0
    for place in [*range(0, 200), *range(len(data) - 900, len(data))]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            check_state(checkpoint.load(path), 30)
        except CheckpointError as error:
            refused += "step-00000030.pt" in str(error)
    assert 300 < refused < 1100


def test_no_whole_one_is_an_error_that_names_each(folder):
    for path in folder.iterdir():
        path.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"(?s)step-00000030\.pt.*step-00000002\.pt"):
        checkpoint.load_latest(folder)


def test_a_damaged_one_never_costs_a_whole_one(folder):
    """Gone on from step 2 and saved at step 3: the damaged 30 goes, and not step 2."""
    (folder / "step-00000030.pt").write_bytes(b"")
    checkpoint.save(folder, 3, state(3))
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002.pt", "step-00000003.pt"]


def test_a_pickle_that_names_code_is_not_run(folder):
    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "made"),))

    torch.save({"step": Code()}, folder / "step-00000030.pt")
    with pytest.raises(CheckpointError, match=r"step-00000030\.pt"):
        checkpoint.load(folder / "step-00000030.pt")
    assert not (folder / "made").exists()


def test_killed_while_it_writes_the_previous_one_stays(folder):
    """A process that stops in the middle of the file leaves no file of that name."""
    code = (
        "import os, sys, torch\n"
        "from mamba_fast.train import checkpoint\n"
        "class Stop:\n"
        "    def __reduce__(self):\n"
        "        os._exit(9)\n"
        f"checkpoint.save({str(folder)!r}, 31, {{'w': torch.zeros(9), 'then': Stop()}})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=os.getcwd(), timeout=100)
    assert done.returncode == 9
    assert (folder / "step-00000031.tmp").exists()
    path, found = checkpoint.load_latest(folder)
    assert path.name == "step-00000030.pt"
    check_state(found, 30)
    checkpoint.save(folder, 31, state(31))
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000030.pt", "step-00000031.pt"]


def test_random_states_go_on(folder):
    random.seed(3)
    torch.manual_seed(3)
    checkpoint.save(folder, 31, {"random": checkpoint.random_states()})
    want = [random.random(), torch.rand(3).tolist()]
    random.seed(4)
    torch.manual_seed(4)
    checkpoint.set_random_states(checkpoint.load_latest(folder)[1]["random"])
    assert [random.random(), torch.rand(3).tolist()] == want
