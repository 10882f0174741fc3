"""The climb from the loop to a kernel: four Triton rungs, one idea each, all with one signature.

k1 keeps the state in registers, k2 reads every number once, k3 takes a tile of time steps at once,
k4 works on all chunks of the sequence in parallel. Each rung is a module of at most 80 lines with
``selective_scan`` (forward only; variable B and C) and ``bytes_moved``, its predicted traffic:

    from mamba_fast.ladder import k3
    y = k3.selective_scan(u, delta, A, B, C)

Importing this package needs no Triton; naming a rung does.
"""

from importlib import import_module

RUNGS = {
    "k1": "mamba_fast.ladder.k1_state_in_registers",
    "k2": "mamba_fast.ladder.k2_read_once",
    "k3": "mamba_fast.ladder.k3_time_tiles",
    "k4": "mamba_fast.ladder.k4_parallel_chunks",
}

__all__ = ["RUNGS", "k1", "k2", "k3", "k4"]


def __getattr__(name):
    """Import a rung when it is first named. Raises ImportError where Triton is missing."""
    if name in RUNGS:
        return import_module(RUNGS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; the rungs are {', '.join(RUNGS)}")
