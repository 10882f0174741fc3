"""What tests of several processes compute, on one process or as one rank's part of it."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mamba_fast import Mamba, MambaConfig, MambaLMHeadModel

VOCAB = 24
CONFIG = MambaConfig(
    d_model=10, n_layer=3, vocab_size=VOCAB, ssm_cfg=dict(d_state=5, d_conv=4, dt_min=0.05, dt_max=0.5)
)


@dataclass(frozen=True)
class Case:
    """Rows of `seqlen` tokens; `packed`: lengths of the sequences in each row; `call`: keywords of the model.

    only_last: the loss sees the last token alone. states: it starts from given states, and sees the last.
    """

    seqlen: int
    batch: int = 2
    packed: tuple = ()
    only_last: bool = False
    states: bool = False
    call: tuple = ()


CASES = {
    "uneven slices": Case(23),
    "slices shorter than the convolution": Case(5, batch=1),
    "one loss at the end": Case(37, only_last=True),
    "checkpointing": Case(18, call=("gradient_checkpointing",)),
    "states in and out": Case(21, states=True),
    "states in, slices of a token": Case(4, states=True),
    "packed": Case(26, packed=((26,), (3, 1, 9, 13), (13, 13), (6, 17, 3), (7, 6, 13)), batch=5),
    "packed, states in and out": Case(26, packed=((26,), (3, 23), (21, 5)), batch=3, states=True),
    "packed, slices of a token": Case(4, packed=((4,), (1, 3), (2, 2), (1, 2, 1)), batch=4),
}


def model_of(dtype, seed=0, config=CONFIG):
    """A language model whose layers decide its logits; float32 holds every parameter exactly."""
    torch.manual_seed(seed)
    model = MambaLMHeadModel(copy.deepcopy(config))
    with torch.no_grad():
        model.backbone.embedding.weight *= 20
        for name, p in model.named_parameters():
            if name.endswith("out_proj.weight"):
                p *= 30
            if name.endswith(("norm.weight", "norm_f.weight", ".D", "A_log", "conv1d.bias")):
                p += torch.rand(p.shape) / 2
    return model.to(dtype)


def tokens_of(case, seed=1):
    """ids (B, L), their seq_idx or None, and the loss's weights (B, L, V) in float32."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (case.batch, case.seqlen), generator=generator)
    weight = torch.randn(case.batch, case.seqlen, VOCAB, generator=generator)
    if case.only_last:
        weight[:, :-1] = 0
    seq_idx = None
    if case.packed:
        rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in case.packed]
        seq_idx = torch.stack(rows) % 2  # values that come again: a change alone starts a sequence
    return ids, seq_idx, weight


def run(case, dtype, split_of=None, config=CONFIG, device="cpu", backend="torch"):
    """{logits, "d" + parameter, states}: of the rows, or this rank's part and share of the gradients.

    split_of(seqlen, seq_idx) makes the SequenceSplit.
    """
    model = model_of(dtype, config=config).to(device)
    ids, seq_idx, weight = (None if v is None else v.to(device) for v in tokens_of(case))
    call = {**dict.fromkeys(case.call, True), "backend": backend}
    split, is_last = None, True
    if split_of is not None:
        split = call["sequence_split"] = split_of(case.seqlen, seq_idx)
        is_last = split.rank == split.ranks - 1
        ids, weight = split.part(ids), split.part(weight)
        seq_idx = split.seq_idx
    given = {}
    if case.states:
        generator = torch.Generator().manual_seed(7)
        for i, pair in model.allocate_inference_cache(case.batch, 0).items():
            made = (torch.randn(v.shape, generator=generator).to(v).requires_grad_() for v in pair)
            given[i] = tuple(made)
        call |= {"initial_states": given, "return_final_states": True}
    out = model(ids, seq_idx=seq_idx, **call)
    loss = (out.logits * weight.to(dtype)).sum()
    found = {"logits": out.logits}
    for i, pair in (out.final_states if case.states else {}).items():
        for name, v in zip(("conv_state", "ssm_state"), pair, strict=True):
            factor = torch.randn(v.shape, generator=torch.Generator().manual_seed(i)).to(v)
            loss = loss + (v * factor).sum() * is_last
            found[f"{name} {i}"] = v if is_last else torch.zeros_like(v)
    loss.backward()
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    for i, pair in given.items():
        found |= {f"dconv_state {i}": pair[0].grad, f"dssm_state {i}": pair[1].grad}
    return {name: v.detach() for name, v in found.items()}


def block(split_of=None):
    """A block alone in float64, with biases: out, and the gradients of its input and its parameters."""
    torch.manual_seed(3)
    mixer = Mamba(6, d_state=3, d_conv=3, bias=True).double()
    x = torch.randn(3, 19, 6, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, 19, 6, dtype=torch.float64)
    split = split_of and split_of(19, None)
    part = split.part if split else lambda v: v
    out = mixer(part(x), backend="torch", sequence_split=split)
    (out * part(weight)).sum().backward()
    return {
        "logits": out.detach(), "dx": x.grad, **{f"d{n}": p.grad for n, p in mixer.named_parameters()}
    }  # fmt: skip


def step(
    dtype, wrap=None, split=None, rows=slice(None), autocast=False, device="cpu", backend="torch"
):  # fmt: skip
    """The model's gradients and its parameters after two steps of AdamW on the mean loss of 4 rows.

    wrap: DDP or FSDP2 of a model; split: its sequences over ranks; rows: those of this process.
    """
    model = model_of(dtype).to(device)
    wrapped = model if wrap is None else wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    ids = tokens_of(Case(22, batch=4))[0].to(device)
    ids, target = ids[rows, :-1], ids[rows, 1:]
    weight, call = 1, {"backend": backend, "gradient_checkpointing": autocast}
    if split is not None:
        ids, target, weight = split.part(ids), split.part(target), split.weight
        call["sequence_split"] = split
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            logits = wrapped(ids, **call).logits
            loss = F.cross_entropy(logits.flatten(0, 1).to(dtype), target.flatten()) * weight
        loss.backward()
        optimizer.step()
    return wrapped
