"""Train a Mamba: `python -m mamba_fast.train CONFIG`, or :func:`train` with a :class:`TrainConfig`."""

from mamba_fast.train.config import ConfigError, TrainConfig, load_config
from mamba_fast.train.data import DataError, TextData
from mamba_fast.train.loop import Result, evaluate, train
from mamba_fast.train.objective import Objective
from mamba_fast.train.parallel import Processes, processes_of
from mamba_fast.train.run import Run
from mamba_fast.train.tasks import Batch, Generated, induction_heads, selective_copying

__all__ = [
    "Batch",
    "ConfigError",
    "DataError",
    "Generated",
    "Objective",
    "Processes",
    "Result",
    "Run",
    "TextData",
    "TrainConfig",
    "evaluate",
    "induction_heads",
    "load_config",
    "processes_of",
    "selective_copying",
    "train",
]
