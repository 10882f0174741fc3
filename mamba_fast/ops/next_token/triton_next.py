"""The next token in Triton: a program a row."""

import torch
import triton
import triton.language as tl

from mamba_fast.ops.rooms import on_device_of
from mamba_fast.ops.triton_chain import early, meet

BLOCK = 8192  # logits that are on their way at a time
WARPS = 16


def greedy(logits, slots):
    """The likeliest token of each row, recorded."""
    batch, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    seen = None if slots.seen is None else slots.seen.view(torch.uint8)
    with on_device_of(logits):
        greedy_token_kernel[(batch,)](
            logits, slots.token, slots.tokens, slots.place, slots.eos, slots.finished.view(torch.uint8), seen,
            slots.penalty, logits.stride(0), 0 if seen is None else seen.stride(0), batch, vocab,
            ENDS=len(slots.eos), BLOCK=min(BLOCK, triton.next_power_of_2(vocab)), num_warps=WARPS,
            **early(logits.device),
        )  # fmt: skip


@triton.jit
def greedy_token_kernel(
    logits_ptr, token_ptr, tokens_ptr, place_ptr, eos_ptr, finished_ptr, seen_ptr, penalty_ptr, stride_logits,
    stride_seen, batch, vocab, ENDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    meet(PDL)
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = lanes
    for start in range(0, vocab, BLOCK):
        offs = start + lanes
        mask = offs < vocab
        raw = tl.load(logits_ptr + offs, mask, float("-inf"))
        x = raw.to(tl.float32)
        if seen_ptr is not None:
            seen = tl.load(seen_ptr + row * stride_seen + offs, mask, 0)
            penalty = tl.load(penalty_ptr)
            lower = tl.where(x < 0, x * penalty, x / penalty).to(raw.dtype).to(tl.float32)
            x = tl.where(seen != 0, lower, x)
        higher = x > best  # of equals a lane keeps its first
        best = tl.where(higher, x, best)
        at = tl.where(higher, offs, at)
    highest = tl.max(best, 0)
    token = tl.min(tl.where(best == highest, at, vocab - 1), 0).to(tl.int64)
    if ENDS > 0:
        finished = tl.load(finished_ptr + row) != 0
        token = tl.where(finished, tl.load(eos_ptr), token)
        for k in tl.static_range(ENDS):
            finished = finished | (token == tl.load(eos_ptr + k))
        tl.store(finished_ptr + row, finished.to(tl.uint8))
    if seen_ptr is not None:
        tl.store(seen_ptr + row * stride_seen + token, 1)
    place = tl.load(place_ptr + row)
    tl.store(tokens_ptr + place * batch + row, token)
    tl.store(place_ptr + row, place + 1)
    tl.store(token_ptr + row, token)
