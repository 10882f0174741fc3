"""Train by a TOML file, by flags, or both; killed and started again, it goes on where it was.

Under torchrun every process takes its part of each step, as the setting `parallel` says.
"""

import argparse
import os
import sys
from dataclasses import MISSING, fields

import torch.distributed as dist

from mamba_fast.checkpoint_files import CheckpointError
from mamba_fast.distributed import init_from_torchrun
from mamba_fast.train import ConfigError, DataError, TrainConfig, load_config, processes_of, train
from mamba_fast.train.config import packaged


def main(arguments=None):
    options = parse(arguments)
    try:
        started = "LOCAL_RANK" in os.environ  # by torchrun
        if started:
            options.changes["device"] = str(init_from_torchrun())
        config = load_config(options.config, options.changes)
        result = train(config, processes=processes_of(config) if started else None)
    except (ConfigError, DataError, CheckpointError, ImportError, OSError) as error:
        sys.exit(str(error))
    if started:
        rank = dist.get_rank()
        dist.destroy_process_group()
        if rank:
            return
    last = result.metrics[-1] if result.metrics else {}
    kept = {k: v for k, v in last.items() if k.endswith(("loss", "accuracy"))}
    found = "".join(f", {k} {'not finite' if v is None else f'{v:.4g}'}" for k, v in kept.items())
    print(f"{result.step} steps, {result.seconds:.0f} s{found}: {result.out / 'curve.png'}")


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
