"""A training run: model, optimizer and data, one optimizer step, and everything a checkpoint holds."""

import contextlib
import os
import random
from dataclasses import asdict, replace

import torch

from mamba_fast.checkpoint_config import config_of
from mamba_fast.checkpoint_files import CheckpointError
from mamba_fast.init import param_groups
from mamba_fast.model import MambaLMHeadModel
from mamba_fast.ops.selective_scan import explain_backend
from mamba_fast.train.checkpoint import random_states, set_random_states
from mamba_fast.train.config import DATA, ConfigError
from mamba_fast.train.data import DataError
from mamba_fast.train.parallel import Processes


class Run:
    """Where a training run stands.

    Parameters
    ----------
    config : a :class:`TrainConfig`
    model, data : in place of those the config describes; data has seek, next, validation, batch_size,
        vocab_size and digest as :class:`TextData` and :class:`Generated` have them
    processes : of :func:`processes_of`, where several share the steps
    """

    def __init__(self, config, model=None, data=None, processes=None):
        self.device, self.processes = device_of(config.device), processes or Processes()
        device = str(self.device)
        self.config = config = replace(config, device=device)
        if config.graph and self.device.type != "cuda":
            raise ConfigError(f"graph: needs an NVIDIA GPU, got device {device!r}")
        if config.graph and processes:
            raise ConfigError(f"graph: expected false with several processes, got true on {processes.ranks}")
        check_machine(self.device, config.backend)
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.data = data_of(config) if data is None else data
        self.model = (model_of(config, self.data.vocab_size) if model is None else model).to(device)
        options = {"gradient_checkpointing": True} if config.gradient_checkpointing else {}
        if config.backend:
            options["backend"] = config.backend
        self.objective = self.processes.objective(self.model, config.dtype, options)
        self.wrapped = self.processes.wrap(self.objective)
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, config.weight_decay), lr=config.lr, betas=tuple(config.betas),
            fused=on_gpu, capturable=on_gpu and config.graph,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        self.step, self.seconds, self.finished = 0, 0.0, False
        self._set_lr_place()
        self.processes.settle(self)

    @property
    def rows_per_step(self):
        return self.config.batch_size * self.config.accumulate * self.processes.row_ranks

    def begin_step(self):
        """What a step needs from outside: the learning rate, and the place in the data."""
        lr = self.config.lr_at(self.step)
        if lr != self.lr:
            self.lr = lr
            if self._lr_place is not None:
                self._lr_place.fill_(lr)
            else:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
        mine = self.processes.row_rank * self.config.batch_size * self.config.accumulate
        self.data.seek(self.step * self.rows_per_step + mine)

    def advance(self):
        """One optimizer step behind :meth:`begin_step`: (loss, norm of the gradient), on the device.

        With accumulation the loss is the mean of the means of its batches. Nothing here waits for a GPU
        (but float16's scaler), so that a CUDA graph can hold all of it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total, pieces = 0.0, self.config.accumulate
        for k in range(pieces):
            apart = getattr(self.wrapped, "no_sync", contextlib.nullcontext)
            with apart() if k < pieces - 1 else contextlib.nullcontext():
                loss = self.wrapped(self.data.next()) / pieces
                self.scaler.scale(loss).backward()
            total = total + loss.detach()
        self.scaler.unscale_(self.optimizer)
        limit = self.config.clip or float("inf")
        norm = self.processes.clip(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total, norm

    def state(self):
        """Everything a checkpoint needs to go on to the bit: tensors and plain values, whole on rank 0.

        The learning rate and the place in the data are functions of `step`.
        """
        model, optimizer = self.processes.state(self.model, self.optimizer)
        return {
            "step": self.step,
            "position": self.step * self.rows_per_step,
            "seconds": self.seconds,
            "finished": self.finished,
            "config": asdict(self.config),
            "data": self.data.digest,
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "random": random_states(),
        }

    def load_state(self, state):
        """Go on where :meth:`state` was on rank 0; ConfigError if settings or data are others."""
        step, position = state["step"], state["position"]
        self.config.same_run(state["config"], same_rows=position == step * self.rows_per_step)
        if position != step * self.rows_per_step:
            raise ConfigError(
                f"batch_size, accumulate: the run in {self.config.out} takes {position // step} rows a step, "
                f"got {self.rows_per_step} with {self.processes.ranks} processes"
            )
        if state["data"] != self.data.digest:
            raise ConfigError(f"data: the run in {self.config.out} was trained on other files")
        self.processes.load(self.model, self.optimizer, state["model"], state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        set_random_states(state["random"])
        self.step, self.seconds, self.finished = state["step"], state["seconds"], state["finished"]
        self._set_lr_place()

    def _set_lr_place(self):
        """On a GPU the rate is one tensor that both groups share: a CUDA graph reads it from there."""
        self.lr = self.config.lr_at(self.step)
        on_gpu = self.device.type == "cuda"
        self._lr_place = torch.tensor(self.lr, device=self.device) if on_gpu else None
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr_place if on_gpu else self.lr


def device_of(name):
    """The torch.device of that name; "" is the GPU if there is one. ConfigError if it is no name of one."""
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ConfigError(f"device: expected cpu, cuda or a number as in cuda:1, got {name!r}") from None


def check_machine(device, backend):
    """ConfigError if the device is not there, or the backend of the scan ("" for any) cannot run on it."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: got {str(device)!r}, and PyTorch finds {torch.cuda.device_count()} NVIDIA GPUs"
        )
    u = torch.empty(1, 1, 1, device=device)
    try:
        explain_backend(u, u, u[0], backend=backend or None)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def data_of(config):
    """The data that a :class:`TrainConfig` describes."""
    try:
        return DATA[config.task](config, **config.data)
    except DataError:
        raise
    except ValueError as error:  # sizes of a task that cannot be
        raise ConfigError(f"{config.task}: {error}") from None


def model_of(config, vocab_size):
    """The language model of a :class:`TrainConfig` on the CPU, for data of `vocab_size` tokens."""
    try:
        shape = config_of({"vocab_size": vocab_size} | config.model, "model")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if shape.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size: expected at least the data's {vocab_size}, got {shape.vocab_size}"
        )
    return MambaLMHeadModel(shape)


@contextlib.contextmanager
def repeatable(wanted):
    """The same bits in every run inside, if `wanted`; PyTorch's settings are put back behind it."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use alone
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
