"""A chunk of logits in Triton: one program a row, which reads it twice and writes its gradient in place."""

import triton
import triton.language as tl

from mamba_fast.ops.rooms import on_device_of

_BLOCK = 8192  # columns a program has in hand
_THREAD = 16  # numbers a thread. A multiprocessor then runs two or three rows, few enough that those of a
# whole GPU are still in its second-level cache when they are read again.


def rows(logits, labels, losses, scale, vocab_size, ignore_index, keep):
    """Write `losses` (T,) of logits (T, V); if `keep`, the logits become scale (softmax - onehot).

    Columns from vocab_size on have no probability, rows with ignore_index no loss and no gradient. The loss
    of a label out of range is NaN.
    """
    total, columns = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(columns))
    stride = logits.stride(0)
    # Up to the end of the row's memory: a limit that is a multiple of 16, as the stride of `chunks` is, lets
    # Triton read 16 bytes at a time.
    width = stride if columns <= stride < columns + 16 else columns
    with on_device_of(logits):
        cross_entropy_kernel[(total,)](
            logits, labels.contiguous(), losses, scale, stride, width, vocab_size, ignore_index,
            KEEP=keep, BLOCK=block, num_warps=max(1, block // (32 * _THREAD)),
        )  # fmt: skip


@triton.jit
def _logits(row_ptr, cols, width, vocab_size):
    """Those of `cols`; -inf from vocab_size on, whatever stands there."""
    p = tl.load(row_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    return tl.where(cols < vocab_size, p, -float("inf"))


@triton.jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, scale_ptr, stride, width, vocab_size, ignore_index,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = lse - logits[label]; if KEEP, logits = scale · (exp(logits - lse) - onehot), 0 where ignored.

    The first pass keeps a maximum and a sum for each place of the block: of exp(top - m) and exp(l - m) one
    is 1, so an element costs one exponential.
    """
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row * stride
    label = tl.load(labels_ptr + row).to(tl.int64)
    live = label != ignore_index
    top = tl.full((BLOCK,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        cols = first + offs
        p = _logits(row_ptr, cols, width, vocab_size)
        rise = p - top
        small = tl.exp(-tl.abs(rise))
        total = tl.where(rise > 0, total * small + 1, total + small)
        top = tl.maximum(top, p)
    highest = tl.max(top, axis=0)
    lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))
    valid = live & (label >= 0) & (label < vocab_size)
    at_label = tl.load(row_ptr + label, mask=valid, other=float("nan")).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(live, lse - at_label, 0.0))
    if KEEP:
        tl.debug_barrier()  # no thread overwrites the label's logit before all have read it
        scale = 1.0
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row).to(tl.float32)
        for first in range(0, width, BLOCK):
            cols = first + offs
            p = _logits(row_ptr, cols, width, vocab_size)
            grad = scale * (tl.exp(p - lse) - tl.where(cols == label, 1.0, 0.0))
            grad = tl.where(live, grad, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(row_ptr + cols, grad, mask=cols < width)
