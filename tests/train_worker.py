"""Run by torchrun: runs of parallel_cases.py, to their end or not, or taken up where they were left."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_cases import CASES, KINDS, MOVED, STOPPED, first_logits, take

from mamba_fast.distributed import init_from_torchrun
from mamba_fast.train import processes_of

sys.modules["numba"] = None  # every process would compile its kernels
init_from_torchrun()
base, what = Path(sys.argv[1]), sys.argv[2]


class Stop(Exception):
    pass


def stop(run, line):
    raise Stop


def die(run, line):
    if run.processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


if what == "start":
    for case, settings in CASES.items():
        for kind in KINDS:
            take(base, f"{case} {kind}", settings, processes_of, parallel=kind)
    torch.save(first_logits(base, processes_of), base / f"logits {dist.get_rank()}.pt")
    for kind in KINDS:
        take(base, f"whole {kind}", STOPPED, processes_of, parallel=kind)
    for kind in ("ddp", "sequence", "fsdp"):
        try:
            hook = die if kind == "fsdp" else stop
            take(base, f"stopped {kind}", STOPPED, processes_of, [hook], parallel=kind)
        except Stop:
            pass
else:
    for kind in KINDS:
        take(base, f"stopped {kind}", STOPPED, processes_of, parallel=kind)
        take(base, f"fsdp to {kind}", STOPPED, processes_of, parallel=kind, accumulate=MOVED[kind])
    take(base, "one to fsdp", STOPPED, processes_of, parallel="fsdp", accumulate=MOVED["fsdp"])
dist.destroy_process_group()
