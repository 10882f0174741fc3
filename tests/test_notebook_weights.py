"""The weights beside the notebooks load, stay small, and are what their script writes."""

import runpy
from pathlib import Path

import torch

from mamba_fast import MambaLMHeadModel, check_init

WEIGHTS = Path(__file__).parent.parent / "notebooks" / "weights"


def test_the_script_writes_what_is_committed(tmp_path):
    runpy.run_path(str(WEIGHTS / "train_07.py"))["main"]("2", tmp_path)
    new, committed = (MambaLMHeadModel.from_pretrained(p) for p in (tmp_path, WEIGHTS / "07_bytes"))
    assert new.config == committed.config
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (WEIGHTS / "07_bytes").iterdir()}
    assert check_init(committed) != []  # trained: A_log and the bias of Δ have moved
    for ours, theirs in zip(new.parameters(), committed.parameters(), strict=True):
        assert ours.shape == theirs.shape
        assert torch.isfinite(theirs).all()


def test_a_file_has_less_than_a_megabyte():
    assert all(p.stat().st_size < 1_000_000 for p in WEIGHTS.rglob("*") if p.is_file())
