"""Train by a TOML file, by flags, or both; killed and started again, it goes on where it was.

Under torchrun every process takes its part of each step, and gradients are averaged (DDP).
"""

import argparse
import os
import sys
from dataclasses import MISSING, fields

import torch.distributed as dist

from mamba_fast.checkpoint_files import CheckpointError
from mamba_fast.distributed import init_from_torchrun, wrap_ddp
from mamba_fast.train import ConfigError, DataError, TrainConfig, load_config, train
from mamba_fast.train.config import packaged


def main(arguments=None):
    options = parse(arguments)
    try:
        among = processes(options.changes)
        config = load_config(options.config, options.changes)
        result = train(config, **among)
    except (ConfigError, DataError, CheckpointError, ImportError) as error:
        sys.exit(str(error))
    if among:
        dist.destroy_process_group()
        if among["rank"]:
            return
    last = result.metrics[-1] if result.metrics else {}
    found = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k.endswith(("loss", "accuracy")))
    print(f"{result.step} steps, {result.seconds:.0f} s, {found}: {result.out / 'curve.png'}")


def processes(changes):
    """What `train` needs to know of the processes that torchrun started, and the device, into `changes`."""
    if "LOCAL_RANK" not in os.environ:
        return {}
    changes["device"] = str(init_from_torchrun())
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "wrap": wrap_ddp}


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m mamba_fast.train", description=__doc__)
    names = ", ".join(packaged())
    parser.add_argument("config", nargs="?", help=f"a TOML file, or one of the package: {names}")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any setting, also of a table: --set lr=0.001 model.d_model=64 data.folder=texts",
    )  # fmt: skip
    for key in fields(TrainConfig):
        if key.default is not MISSING:
            flag = f"--{key.name.replace('_', '-')}"
            parser.add_argument(flag, metavar=key.type.__name__, help=f"default: {key.default!r}")
    options = vars(parser.parse_args(arguments))
    config, pairs = options.pop("config"), options.pop("set")
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        parser.error(f"--set: expected KEY=VALUE, got {wrong[0]!r}")
    changes = {k: v for k, v in options.items() if v is not None} | dict(p.split("=", 1) for p in pairs)
    return argparse.Namespace(config=config, changes=changes)


if __name__ == "__main__":
    main()
