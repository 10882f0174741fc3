"""A training run: model, optimizer and data, one optimizer step, and everything a checkpoint holds."""

import contextlib
import os
import random
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import nn

from mamba_fast.config import MambaConfig
from mamba_fast.init import param_groups
from mamba_fast.loss import head_loss
from mamba_fast.model import MambaLMHeadModel
from mamba_fast.sequence import room_of, wide
from mamba_fast.train.checkpoint import random_states, set_random_states
from mamba_fast.train.config import DATA, ConfigError
from mamba_fast.train.tasks import IGNORED


class Objective(nn.Module):
    """The loss of a model on a :class:`Batch`: mean cross-entropy of the labels that count, in float32.

    model: a :class:`MambaLMHeadModel`, or a module that is called as one. dtype: of autocast. options:
    keywords for its forward. A module, so that a data-parallel wrapper can hold it.
    """

    def __init__(self, model, dtype="float32", options=None):
        super().__init__()
        self.model, self.dtype, self.options = model, getattr(torch, dtype), options or {}

    def forward(self, batch):
        if batch.last or not isinstance(self.model, MambaLMHeadModel):
            logits, labels = self.logits(batch)
            return F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        with self._autocast(batch):
            hidden_states = self.model.backbone(batch.input_ids, **self._options(batch))
            room = room_of(self.options.get("backend"))
            return head_loss(self.model.lm_head, hidden_states, batch.labels, IGNORED, room)

    def logits(self, batch):
        """Logits and labels of the tokens that may count: (B, last, V) and (B, last)."""
        with self._autocast(batch):
            logits = self.model(batch.input_ids, num_last_tokens=batch.last, **self._options(batch)).logits
        return logits, batch.labels[:, -batch.last :]  # -0 is all of them

    def _autocast(self, batch):
        device = batch.input_ids.device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    def _options(self, batch):
        return self.options if batch.seq_idx is None else {**self.options, "seq_idx": batch.seq_idx}


class Run:
    """Where a training run stands.

    Parameters
    ----------
    config : a :class:`TrainConfig`
    model, data : in place of those the config describes; data has seek, next, validation, batch_size,
        vocab_size and digest as :class:`TextData` and :class:`Generated` have them
    rank, world_size : of several processes each takes its own rows of every step
    wrap : what a data-parallel run puts around the :class:`Objective`
    """

    def __init__(self, config, model=None, data=None, rank=0, world_size=1, wrap=None):
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.config = config = replace(config, device=device)
        self.device, self.rank, self.world_size = torch.device(device), rank, world_size
        if config.graph and self.device.type != "cuda":
            raise ConfigError(f"graph: needs an NVIDIA GPU, got device {device!r}")
        if config.graph and wrap:
            raise ConfigError(f"graph: expected one process, got {world_size}")
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.data = DATA[config.task](config, **config.data) if data is None else data
        self.model = (model_of(config, self.data.vocab_size) if model is None else model).to(device)
        options = {"gradient_checkpointing": True} if config.gradient_checkpointing else {}
        if config.backend:
            options["backend"] = config.backend
        self.objective = Objective(self.model, config.dtype, options)
        self.wrapped = wrap(self.objective) if wrap else self.objective
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, config.weight_decay), lr=config.lr, betas=tuple(config.betas),
            fused=on_gpu, capturable=on_gpu and config.graph,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        self.step, self.seconds, self.finished = 0, 0.0, False
        self._set_lr_place()

    @property
    def rows_per_step(self):
        return self.config.batch_size * self.config.accumulate * self.world_size

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
        mine = self.rank * self.config.batch_size * self.config.accumulate
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
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total, norm

    def state(self):
        """Everything a checkpoint needs to go on to the bit: tensors and plain values.

        The learning rate and the place in the data are functions of `step`.
        """
        return {
            "step": self.step,
            "position": self.step * self.rows_per_step,
            "seconds": self.seconds,
            "finished": self.finished,
            "config": asdict(self.config),
            "data": self.data.digest,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states(),
        }

    def load_state(self, state):
        """Go on where :meth:`state` was; ConfigError if settings or data are others."""
        self.config.same_run(state["config"])
        if state["data"] != self.data.digest or state["position"] != state["step"] * self.rows_per_step:
            raise ConfigError(f"data: the run in {self.config.out} was trained on other files or other ranks")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
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


def model_of(config, vocab_size):
    """The language model of a :class:`TrainConfig` on the CPU, for data of `vocab_size` tokens."""
    shape = MambaConfig(**({"vocab_size": vocab_size} | config.model))
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
