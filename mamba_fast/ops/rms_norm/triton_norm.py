"""Add and norm in Triton: a program reads whole rows once and keeps them in registers.

The backward's programs walk over many rows each, so that dweight and dbias are added up in registers
first; what the programs found is then summed in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mamba_fast.ops.rooms import multiprocessors, on_device_of

_FORWARD_TILE, _BACKWARD_TILE = 2048, 4096  # numbers a program, if more than one row fits
_FORWARD_THREAD, _BACKWARD_THREAD = 16, 16  # numbers a thread
_PROGRAMS_A_MULTIPROCESSOR = 4  # of the backward
_WARPS = 32  # at most


class _Plan(NamedTuple):
    """How rows are cut: tiles of (rows, block) numbers, and the warps of a program."""

    rows: int
    block: int
    warps: int


def _plan(total, width, tile, a_thread):
    block = triton.next_power_of_2(width)
    rows = max(1, min(tile // block, triton.next_power_of_2(total)))
    return _Plan(rows, block, max(1, min(_WARPS, rows * block // (32 * a_thread))))


def forward(x, weight, bias, residual, eps, sum_dtype, rms, store, keep):
    """y like x, s = x + residual in `sum_dtype` if `store`; mean (not if rms) and 1 / std a row if `keep`."""
    x_rows, residual_rows = _rows(x), _rows(residual)
    total, width = x_rows.shape
    plan = _plan(total, width, _FORWARD_TILE, _FORWARD_THREAD)
    y = x.new_empty(x.shape)
    s = x.new_empty(x.shape if store else 0, dtype=sum_dtype)
    mean = x.new_empty(total if keep and not rms else 0, dtype=torch.float32)
    rstd = x.new_empty(total if keep else 0, dtype=torch.float32)
    with on_device_of(x):
        norm_forward_kernel[(-(-total // plan.rows),)](
            x_rows, residual_rows, weight.contiguous(), None if bias is None else bias.contiguous(), y,
            s if store else None, mean if keep and not rms else None, rstd if keep else None,
            x_rows.stride(0), 0 if residual is None else residual_rows.stride(0), total, eps,
            WIDTH=width, RMS=rms, ROWS=plan.rows, BLOCK=plan.block, num_warps=plan.warps,
        )  # fmt: skip
    return y, s, mean, rstd


def backward(dy, ds, s, residual, weight, bias, mean, rstd, x_dtype, residual_dtype, rms):
    """Of the norm of s + residual: dx, dresidual (None where dx is the same), dweight, dbias or None."""
    rows = [_rows(v) for v in (dy, ds, s, residual)]
    total, width = rows[0].shape
    plan = _plan(total, width, _BACKWARD_TILE, _BACKWARD_THREAD)
    programs = min(-(-total // plan.rows), _PROGRAMS_A_MULTIPROCESSOR * multiprocessors(dy))
    dx = dy.new_empty(dy.shape, dtype=x_dtype)
    apart = residual_dtype not in (None, x_dtype)
    dresidual = dy.new_empty(dy.shape, dtype=residual_dtype) if apart else None
    parts = dy.new_empty(1 if bias is None else 2, programs, width, dtype=torch.float32)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    with on_device_of(dy):
        norm_backward_kernel[(programs,)](
            *rows, weight.contiguous(), None if rms else mean, rstd, dx, dresidual, parts,
            *(0 if v is None else v.stride(0) for v in rows), total, programs,
            WIDTH=width, RMS=rms, HAS_BIAS=bias is not None, ROWS=plan.rows, BLOCK=plan.block,
            num_warps=plan.warps,
        )  # fmt: skip
        sum_parts_kernel[(-(-width // 32), len(parts))](
            parts, dweight, dbias, programs, WIDTH=width, ROWS=128, BLOCK=32, num_warps=8
        )
    return dx, dresidual, dweight, dbias


def _rows(v):
    """(..., M) as (rows, M) with neighbours side by side; a copy only where strides leave no other way."""
    if v is None:
        return None
    v = v.reshape(-1, v.shape[-1])
    return v if v.stride(1) == 1 or v.shape[1] == 1 else v.contiguous()


@triton.jit
def _tile_of(ptr, stride, rows, cols, mask):
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, total, eps,
    WIDTH: tl.constexpr, RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """s = x + residual, y = (s - mean) / sqrt(mean of (s - mean)^2 + eps) · weight + bias; RMS: mean is 0."""
    first, i, cols = tl.program_id(0) * ROWS, tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask_rows, mask_cols = i < total - first, cols < WIDTH
    rows = first.to(tl.int64) + i
    mask = mask_rows[:, None] & mask_cols[None, :]
    s = _tile_of(x_ptr, x_stride, rows, cols, mask)
    if residual_ptr is not None:
        s += _tile_of(residual_ptr, residual_stride, rows, cols, mask)
    offs = rows[:, None] * WIDTH + cols[None, :]
    if sum_ptr is not None:
        tl.store(sum_ptr + offs, s.to(sum_ptr.dtype.element_ty), mask=mask)
    if not RMS:
        mean = tl.sum(s, axis=1) / WIDTH
        s = tl.where(mask_cols[None, :], s - mean[:, None], 0.0)
        if mean_ptr is not None:
            tl.store(mean_ptr + rows, mean, mask=mask_rows)
    rstd = 1 / tl.sqrt(tl.sum(s * s, axis=1) / WIDTH + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=mask_rows)
    y = s * rstd[:, None] * tl.load(weight_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    dy_ptr, ds_ptr, s_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr, parts_ptr,
    dy_stride, ds_stride, s_stride, residual_stride, total, programs,
    WIDTH: tl.constexpr, RMS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = ((g - mean(g)) - x̂ mean(g x̂)) / std + ds with g = dy · weight; RMS: without mean(g).

    parts (1 or 2, programs, WIDTH): this program's sums over rows of dy x̂ (dweight) and dy (dbias).
    """
    pid, i, cols = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask_cols = cols < WIDTH
    weight = tl.load(weight_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(pid * ROWS, total, programs * ROWS):
        mask_rows = i < total - first
        rows = tl.cast(first, tl.int64) + i
        mask = mask_rows[:, None] & mask_cols[None, :]
        x_hat = _tile_of(s_ptr, s_stride, rows, cols, mask)
        if residual_ptr is not None:
            x_hat += _tile_of(residual_ptr, residual_stride, rows, cols, mask)
        dy = _tile_of(dy_ptr, dy_stride, rows, cols, mask)
        rstd = tl.load(rstd_ptr + rows, mask=mask_rows, other=0.0)
        if not RMS:
            x_hat -= tl.load(mean_ptr + rows, mask=mask_rows, other=0.0)[:, None]
        x_hat *= rstd[:, None]
        g = dy * weight[None, :]
        dweight += dy * x_hat
        dx = g - x_hat * (tl.sum(g * x_hat, axis=1) / WIDTH)[:, None]
        if HAS_BIAS:
            dbias += dy
        if not RMS:
            dx -= (tl.sum(g, axis=1) / WIDTH)[:, None]
        dx *= rstd[:, None]
        if ds_ptr is not None:
            dx += _tile_of(ds_ptr, ds_stride, rows, cols, mask)
        offs = rows[:, None] * WIDTH + cols[None, :]
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offs, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
    part_ptrs = parts_ptr + tl.cast(pid, tl.int64) * WIDTH + cols
    tl.store(part_ptrs, tl.sum(dweight, axis=0), mask=mask_cols)
    if HAS_BIAS:
        tl.store(part_ptrs + tl.cast(programs, tl.int64) * WIDTH, tl.sum(dbias, axis=0), mask=mask_cols)


@triton.jit
def sum_parts_kernel(
    parts_ptr, dweight_ptr, dbias_ptr, programs, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dweight and dbias: parts (1 or 2, programs, WIDTH) summed over programs, always in the same order."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ptrs = parts_ptr + tl.program_id(1).to(tl.int64) * programs * WIDTH + cols[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < programs)[:, None] & (cols < WIDTH)[None, :]
        total += tl.load(ptrs + rows.to(tl.int64)[:, None] * WIDTH, mask=mask, other=0.0)
    total = tl.sum(total, axis=0)
    if tl.program_id(1) == 0:
        tl.store(dweight_ptr + cols, total.to(dweight_ptr.dtype.element_ty), mask=cols < WIDTH)
    elif dbias_ptr is not None:
        tl.store(dbias_ptr + cols, total.to(dbias_ptr.dtype.element_ty), mask=cols < WIDTH)
