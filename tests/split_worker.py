"""Run by torchrun, once for each number of processes: every case's part of this rank, into a folder."""

import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from split_cases import CASES, block, run, step
from torch.distributed.tensor import DTensor

from mamba_fast.distributed import SequenceSplit, full_state_dict, init_from_torchrun, shard, wrap_ddp

sys.modules["numba"] = None  # every process would compile its kernels

if os.environ["WORLD_SIZE"] == "4":  # the page's example, which joins the processes itself
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text("utf-8")
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "scaling.md", "exec"), {})
else:
    assert init_from_torchrun() == torch.device("cpu")
out, rank, ranks = Path(sys.argv[1]), dist.get_rank(), dist.get_world_size()


def split_of(seqlen, seq_idx):
    return SequenceSplit(seqlen, seq_idx=seq_idx)


def whole(model):
    """Gradients and parameters of a wrapped model, whole, on every rank."""
    found = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        for label, v in ((f"d{name}", p.grad), (name, p.detach())):
            found[label] = v.full_tensor() if isinstance(v, DTensor) else v
    return found


for name, case in CASES.items():
    if case.seqlen >= ranks:
        for dtype in (torch.float32, torch.float64):
            torch.save(run(case, dtype, split_of), out / f"{name} {dtype} {rank}.pt")
torch.save(block(split_of), out / f"block {rank}.pt")

sent = []  # bytes that this rank has for each collective of one call, forward and backward


def counted(name, place):
    """The collective, which also notes what it is given in `place`."""
    collective = getattr(dist, name)

    def call(*args, **kwargs):
        sent.append((name, args[place].nbytes))
        return collective(*args, **kwargs)

    setattr(dist, name, call)


counted("all_gather", 1)
counted("reduce_scatter", 0)
run(CASES["uneven slices"], torch.float32, split_of)
torch.save(sent, out / f"sent {rank}.pt")

mesh = dist.device_mesh.init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "sequence"))
mine = slice(mesh.get_local_rank("data"), None, ranks // 2)
split = SequenceSplit(21, mesh.get_group("sequence"))
rows = slice(rank, None, ranks)
for label, wrap in (("ddp", wrap_ddp), ("fsdp", shard)):
    torch.save(whole(step(torch.float64, wrap, rows=rows)), out / f"{label} {rank}.pt")
    both = step(torch.float64, wrap, split, mine)
    torch.save(whole(both), out / f"{label} and sequence {rank}.pt")
    torch.save(full_state_dict(both), out / f"{label} state dict {rank}.pt")

sharded = step(torch.float32, shard, split, mine, autocast=True)
facts = {
    "found": whole(sharded),
    "local": sum(p.to_local().numel() for p in sharded.parameters()),
    "dtypes": {p.dtype for p in sharded.parameters()},
    "marks": [getattr(layer.mixer.A_log, "_no_weight_decay", False) for layer in sharded.backbone.layers],
}
torch.save(facts, out / f"autocast {rank}.pt")
dist.destroy_process_group()
