"""How several processes share the steps of a run: by rows, by rows and parameters, or by slices of rows."""

import torch.distributed as dist
from torch import nn

from mamba_fast.distributed import full_state_dict, shard, wrap_ddp
from mamba_fast.model import MambaLMHeadModel
from mamba_fast.train.config import ConfigError
from mamba_fast.train.objective import Objective, SliceObjective


class Processes:
    """Process `rank` of `ranks`, which takes rows of its own and exchanges nothing: by default the only one.

    The base of those below. All processes of a run make the same calls.

    row_rank, row_ranks : which of how many parts of the rows of a step this process takes
    """

    def __init__(self, rank=0, ranks=1):
        self.rank, self.ranks = self.row_rank, self.row_ranks = rank, ranks

    def objective(self, model, dtype, options):
        return Objective(model, dtype, options)

    def wrap(self, objective):
        """What is called in a step in place of the objective; it makes gradients those of all processes."""
        return objective

    def settle(self, run):
        """Done once, before the first step and before a checkpoint is read."""

    def clip(self, parameters, limit):
        """Clip gradients to the norm `limit`; the norm before that, over all parameters."""
        return nn.utils.clip_grad_norm_(parameters, limit)

    def mean(self, value):
        """The mean of a scalar tensor over the processes."""
        return value

    def state(self, model, optimizer):
        """The state dicts of both, whole on rank 0, as one process has them."""
        return model.state_dict(), optimizer.state_dict()

    def load(self, model, optimizer, weights, states):
        """Take up what :meth:`state` gave on rank 0, of whatever kind of processes."""
        model.load_state_dict(weights)
        optimizer.load_state_dict(states)

    def whole(self, model):
        """On rank 0 the model with whole parameters."""
        return model


class Copies(Processes):
    """Each process has the model and rows of its own; gradients are means over processes (DDP)."""

    def wrap(self, objective):
        return wrap_ddp(objective)

    def settle(self, run):
        """One backward for nothing: DDP lays out its sums by the order in which gradients come.

        It knows that order behind the first one; and where a number lies decides in which order more than
        two processes add it up. Without this a run that goes on would differ in its first step.
        """
        run.data.seek(0)
        run.wrapped(run.data.next()).backward()
        run.optimizer.zero_grad(set_to_none=True)

    def mean(self, value):
        value = value.clone()
        dist.all_reduce(value)
        return value / self.ranks


class Shards(Copies):
    """As :class:`Copies`, with parameters, gradients and optimizer states cut over processes (FSDP2)."""

    def wrap(self, objective):
        from torch.distributed.fsdp import register_fsdp_forward_method

        shard(objective)
        register_fsdp_forward_method(objective, "logits")  # it gathers parameters too
        return objective

    def settle(self, run):
        """Nothing: a block's gradients always lie in the order of its parameters."""

    def clip(self, parameters, limit):
        return super().clip(parameters, limit).full_tensor()

    def state(self, model, optimizer):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        weights = full_state_dict(model)  # first: it gives back what an evaluation has left gathered
        states = get_optimizer_state_dict(model, optimizer, options=_whole())
        if self.rank:
            return {}, {}
        number = {name: k for k, name in enumerate(_names(model, optimizer))}
        return weights, _renamed(states, number)

    def load(self, model, optimizer, weights, states):
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        set_model_state_dict(model, weights, options=_whole())
        states = _renamed(states, _names(model, optimizer))
        set_optimizer_state_dict(model, optimizer, states, options=_whole())

    def whole(self, model):
        weights = full_state_dict(model)
        if self.rank or not isinstance(model, MambaLMHeadModel):
            return model
        plain = type(model)(model.config, device="meta")
        plain.load_state_dict(weights, assign=True)
        plain.tie_weights()
        return plain


class Slices(Copies):
    """All processes take the same rows, each a slice of every row; gradients are means of scaled shares."""

    def __init__(self, rank, ranks):
        super().__init__(rank, ranks)
        self.row_rank, self.row_ranks = 0, 1
        self.group = dist.new_group()  # so that a layer's exchange does not queue behind DDP's gradients

    def objective(self, model, dtype, options):
        return SliceObjective(model, dtype, options, self.group)


KINDS = {"ddp": Copies, "fsdp": Shards, "sequence": Slices}


def processes_of(config):
    """This one of the processes of torch.distributed, which share steps as config.parallel says."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if config.parallel == "sequence" and config.seqlen < ranks:
        raise ConfigError(
            f"seqlen: expected a token for each of {ranks} processes with parallel = 'sequence', "
            f"got {config.seqlen}"
        )
    return KINDS[config.parallel](rank, ranks)


def _whole():
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _names(model, optimizer):
    """The name of each parameter that the optimizer has, in its order."""
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _renamed(states, other):
    """A state dict of an optimizer with parameter k called other[k]."""
    groups = [group | {"params": [other[k] for k in group["params"]]} for group in states["param_groups"]]
    return {"state": {other[k]: v for k, v in states["state"].items()}, "param_groups": groups}
