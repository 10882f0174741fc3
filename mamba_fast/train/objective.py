"""The loss of a model on a batch, and on one process's slice of it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mamba_fast.distributed import SequenceSplit
from mamba_fast.loss import head_loss
from mamba_fast.model import MambaLMHeadModel
from mamba_fast.sequence import room_of, wide
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
        return self._loss(batch, "mean", self.options)

    def logits(self, batch):
        """Logits and labels of the tokens that may count: (B, last, V) and (B, last)."""
        return self._logits(batch, self.options)

    def whole(self, loss, right):
        """Sums that :func:`evaluate` has made, over all processes that hold a part of each batch."""
        return loss, right

    def _loss(self, batch, reduction, options):
        if batch.last or not isinstance(self.model, MambaLMHeadModel):
            logits, labels = self._logits(batch, options)
            logits, labels = wide(logits).flatten(0, 1), labels.flatten()
            return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction=reduction)
        with self._autocast(batch):
            hidden_states = self.model.backbone(batch.input_ids, **_packed(batch, options))
            room = room_of(options.get("backend"))
            return head_loss(self.model.lm_head, hidden_states, batch.labels, IGNORED, room, reduction)

    def _logits(self, batch, options):
        with self._autocast(batch):
            options = _packed(batch, options)
            logits = self.model(batch.input_ids, num_last_tokens=batch.last, **options).logits
        return logits, batch.labels[:, -batch.last :]  # -0 is all of them

    def _autocast(self, batch):
        """Without its cache, which would keep whole weights that FSDP2 has given back."""
        device, enabled = batch.input_ids.device.type, self.dtype != torch.float32
        return torch.autocast(device, self.dtype, enabled=enabled, cache_enabled=False)


class SliceObjective(Objective):
    """The same of one slice of every row, the others being with the other processes of `group`.

    The loss is P times this slice's share of the mean over the rows, so that its mean over the P processes
    is that of the rows, and so are gradients as DDP makes them. The labels that count are counted in the
    whole rows: a slice may hold fewer than others, or none.
    """

    def __init__(self, model, dtype, options, group):
        super().__init__(model, dtype, options)
        self.group = group

    def forward(self, batch):
        part, options, split = self._part(batch)
        count = (batch.labels != IGNORED).sum()
        return self._loss(part, "sum", options) * split.ranks / count

    def logits(self, batch):
        """Logits and labels of the slice: (B, L / P, V) and (B, L / P)."""
        part, options, _ = self._part(batch)
        return self._logits(part, options)

    def whole(self, loss, right):
        ranks, device = dist.get_world_size(self.group), next(self.model.parameters()).device
        sums = torch.tensor([loss / ranks, right], dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=self.group)
        return sums.tolist()

    def _part(self, batch):
        """This slice as a :class:`Batch`, the model's keywords, the :class:`SequenceSplit`."""
        split = SequenceSplit(batch.input_ids.shape[1], self.group, batch.seq_idx)
        ids, labels = (split.part(v).contiguous() for v in (batch.input_ids, batch.labels))
        part = batch._replace(input_ids=ids, labels=labels, seq_idx=split.seq_idx, last=0)
        return part, {**self.options, "sequence_split": split}, split


def _packed(batch, options):
    return options if batch.seq_idx is None else {**options, "seq_idx": batch.seq_idx}
