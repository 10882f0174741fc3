"""Chunk by chunk: a product makes logits, a room turns them into losses and gradients, products use those."""

import importlib

import torch

CHUNK_BYTES = 2**28  # of logits held at a time: small beside a model, large enough to fill a GPU
_MULTIPLE = 128  # rows of a chunk: whole tiles of the products
# Rows of logits begin at multiples of so many numbers, or half-precision products are slow (8), and Triton
# cannot tell that 16 bytes may be read at a time (16).
_ALIGNED = 16


def losses_and_gradients(hidden, weight, bias, labels, scale, dtype, vocab_size, ignore_index, room, keep):
    """Losses (T,) and the gradients of Σ_t scale_t loss_t in hidden, weight and bias, where `keep` asks.

    hidden (T, E), weight (V, E); scale (T,), None for ones. Products in `dtype`. The gradients that sum over
    tokens are added up in float32 and stay in it (float64 for float64); None where not asked for.
    """
    rows_of = importlib.import_module(f"{__package__}.{room}_rows").rows
    hidden, weight, bias = (None if v is None else v.to(dtype) for v in (hidden, weight, bias))
    tokens, wide = len(hidden), torch.promote_types(dtype, torch.float32)
    losses = hidden.new_empty(tokens, dtype=wide)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if keep[0] else None
    dweight = weight.new_zeros(weight.shape, dtype=wide) if keep[1] else None
    dbias = weight.new_zeros(len(weight), dtype=wide) if keep[2] else None
    rows = rows_of_a_chunk(tokens, len(weight), dtype)
    padded = -(-len(weight) // _ALIGNED) * _ALIGNED
    buffer = hidden.new_empty(rows, padded)[:, : len(weight)]
    for first in range(0, tokens, rows or 1):
        part = slice(first, first + rows)
        h = hidden[part]
        logits = buffer[: len(h)]
        if bias is None:
            torch.mm(h, weight.T, out=logits)
        else:
            torch.addmm(bias, h, weight.T, out=logits)
        scales = None if scale is None else scale[part]
        rows_of(logits, labels[part], losses[part], scales, vocab_size, ignore_index, any(keep))
        if keep[0]:  # the logits are their gradients by now
            torch.mm(logits, weight, out=dhidden[part])
        if keep[1]:
            add_product(dweight, logits.T, h)
        if keep[2]:
            dbias += logits.sum(0, dtype=wide)
    return losses, dhidden, dweight, dbias


def rows_of_a_chunk(tokens, columns, dtype):
    """Chunks of about equal size within CHUNK_BYTES; all tokens where that is less."""
    most = max(1, CHUNK_BYTES // (columns * dtype.itemsize))
    if tokens <= most:
        return tokens
    even = -(-tokens // -(-tokens // most))
    whole = -(-even // _MULTIPLE) * _MULTIPLE
    return whole if whole <= most else even


def add_product(total, a, b):
    """total += a b, in total's type; on a GPU without rounding a b to theirs."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)
