"""A sequence split over one process: every backend's own path; and what is refused."""

import re

import pytest
import torch
import torch.distributed as dist
from split_cases import block

from mamba_fast import InferenceParams, Mamba
from mamba_fast.distributed import SequenceSplit, init_from_torchrun, shard
from mamba_ref.checks import bounds, check


@pytest.fixture(autouse=True)
def alone(tmp_path):
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_backend(backend, device):
    """A row, and one that is packed, from states to states: each backend's scans and summaries, exchanged
    with nobody."""
    torch.manual_seed(1)
    mixer = Mamba(2, d_state=2, d_conv=4)
    x, weight = torch.randn(2, 33, 2), torch.randn(2, 33, 2)
    states = [torch.randn(2, 4, 4), torch.randn(2, 4, 2)]
    factors = [torch.randn(2, 4, 4), torch.randn(2, 4, 2)]
    seq_idx = torch.tensor([[0] * 33, [3] * 7 + [1] * 26])

    def run(dtype, device, backend, split):
        model = mixer.to(device, dtype)
        model.zero_grad()
        given = [v.to(device, dtype, copy=True).requires_grad_() for v in (x, *states)]
        packed = seq_idx.to(device)
        split = SequenceSplit(33, seq_idx=packed) if split else None
        out, after = model(
            given[0], seq_idx=packed, initial_states=given[1:], return_final_states=True, backend=backend,
            sequence_split=split,
        )  # fmt: skip
        loss = (out * weight.to(out)).sum()
        for v, factor in zip(after, factors, strict=True):
            loss = loss + (v * factor.to(v)).sum()
        loss.backward()
        found = {"out": out, "conv_state": after[0], "ssm_state": after[1]}
        found |= dict(zip(("dx", "dconv_state", "dssm_state"), (v.grad for v in given), strict=True))
        found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
        return {name: v.detach().clone() for name, v in found.items()}

    want = run(torch.float64, "cpu", "torch", False)
    plain = run(torch.float32, "cpu", "torch", False)
    got = run(torch.float32, device, backend, True)
    limits = bounds(plain, want)
    for name, value in want.items():
        check(name, got[name], value, limits[name])


def test_a_group_of_one_in_float64():
    got, want = block(lambda seqlen, seq_idx: SequenceSplit(seqlen, seq_idx=seq_idx)), block()
    for name, value in want.items():
        check(name, got[name], value, 2.0**-45)


def test_what_a_split_refuses():
    mixer, x = Mamba(4), torch.randn(2, 9, 4)
    split, packed = SequenceSplit(9), SequenceSplit(9, seq_idx=torch.zeros(2, 9, dtype=torch.int64))
    for message, call in {
        "seqlen: expected a token for each of 1 ranks, got 0": lambda: SequenceSplit(0),
        "seq_idx: expected (B, 9), got (2, 8)": lambda: SequenceSplit(9, seq_idx=torch.zeros(2, 8)),
        "tokens: expected (B, 9, ...), got (2, 8, 4)": lambda: split.part(x[:, 1:]),
        "hidden_states: rank 0 of 1 holds 9 of 9 tokens, got 8": lambda: mixer(
            x[:, 1:], sequence_split=split
        ),
        "attention_mask, cu_seqlens: expected None beside sequence_split": lambda: mixer(
            x, attention_mask=torch.ones(2, 9, dtype=torch.bool), sequence_split=split
        ),
        "seq_idx: expected that of whole rows at SequenceSplit": lambda: mixer(x, sequence_split=packed),
        "seq_idx: expected that of whole rows": lambda: mixer(
            x, seq_idx=packed.seq_idx, sequence_split=split
        ),
        "inference_params: holds the states; give no initial_states or sequence_split": lambda: mixer(
            x, inference_params=InferenceParams(9, 2), sequence_split=split
        ),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize("split", [False, True])
def test_parameters_can_be_freed_after_a_call(backend, device, split):
    """FSDP2 frees the gathered parameters of a block: no backend may take hold of their memory."""
    mixer = Mamba(2, d_state=2, device=device)
    options = {"sequence_split": SequenceSplit(3)} if split else {}
    mixer(torch.randn(1, 3, 2, device=device), backend=backend, **options).sum().backward()
    assert [name for name, p in mixer.named_parameters() if not p.untyped_storage().resizable()] == []


def test_what_the_helpers_refuse(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RuntimeError, match="LOCAL_RANK: set by torchrun"):
        init_from_torchrun()
    with pytest.raises(ValueError, match="model: expected parameters of one type, got bfloat16, float32"):
        shard(Mamba(4, dtype=torch.bfloat16))
