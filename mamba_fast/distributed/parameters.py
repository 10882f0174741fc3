"""Copies of a model on every process (DDP), or each parameter cut over all of them (FSDP2)."""

import os

import torch
import torch.distributed as dist
from torch import nn

from mamba_fast.block import Block
from mamba_fast.init import mark_scan_parameters
from mamba_fast.mixer import Mamba


def init_from_torchrun():
    """Join the processes that ``torchrun`` started, and return this one's device.

    NCCL and the GPU of LOCAL_RANK where there are GPUs, gloo and the CPU elsewhere. Raises RuntimeError
    outside of torchrun.
    """
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError("LOCAL_RANK: set by torchrun, which starts this program; got none")
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def wrap_ddp(model, group=None):
    """The model in DistributedDataParallel: gradients are the mean over the processes of `group`.

    Parameters keep their types, A_log, D and the bias of Δ float32 among them: work in bfloat16 under
    ``torch.autocast``. Gradients of 4 bytes a parameter travel in each step, while the backward runs.
    """
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=group,
        gradient_as_bucket_view=True,
    )


def shard(model, mesh=None, reshard_after_forward=True):
    """Cut every parameter over the processes of `mesh` in place (FSDP2), and return the model.

    Each :class:`Block` is gathered before it runs and given back after; gradients are the mean over
    processes, and each keeps its part of them and of the optimizer's states: 16 bytes a parameter / P with
    AdamW in float32.

    Parameters
    ----------
    model : its parameters of one type; float32, as training wants them
    mesh : a DeviceMesh, one-dimensional, or (copies, shards); all processes if None
    reshard_after_forward : False keeps the gathered parameters for the backward: more memory, a third less
        traffic

    Raises
    ------
    ValueError : parameters of several types, such as a model made with ``dtype=torch.bfloat16``

    Notes
    -----
    A policy of FSDP casts all parameters of a block alike, and would round A_log, D and the bias of Δ. So
    nothing is cast here: parameters travel as they are, and the products are done in bfloat16 under
    ``torch.autocast(..., cache_enabled=False)``: its cache would keep a copy of every weight.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1:
        found = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise ValueError(
            f"model: expected parameters of one type, got {found}; make it float32, and autocast"
        )
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)}
    for module in list(model.modules()):
        if isinstance(module, Block):
            fully_shard(module, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, Mamba):
            mark_scan_parameters(module)  # the parameters are new objects
    return model


def full_state_dict(model):
    """Every parameter whole, on the CPU of rank 0; empty on other ranks. All call it.

    For a model in DDP, a sharded one, or a plain one: under the names of the plain model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
