"""Add and norm in Triton: a program reads whole rows once and keeps them in registers.

The backward's programs walk over many rows each, so that dweight and dbias are added up in registers
first; what the programs found is then summed in a fixed order.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mamba_fast.ops.rooms import multiprocessors, on_device_of
from mamba_fast.ops.triton_chain import early, meet
from mamba_fast.ops.triton_launch import Launch, looks, named

_FORWARD_TILE = 2048  # numbers a program, if more than one row fits
_FORWARD_THREAD = 16  # numbers a thread
_BACKWARD_TILE = 2048  # the same of the backward, of rows filled up to a power of two
_BACKWARD_THREAD = 32  # numbers a thread where more than four warps are needed, up to _WARPS
_PIECES = (
    8  # of such a row: a width that is no power of two leaves out whole pieces, so that few threads idle
)
_PROGRAMS_A_MULTIPROCESSOR = 3  # of the backward
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


def _plan_backward(total, width):
    """The same with a row in pieces of `block` numbers, in place of one."""
    filled = triton.next_power_of_2(width)
    block = max(1, filled // _PIECES)
    blocks = -(-width // block)
    rows = max(1, min(_BACKWARD_TILE // filled, triton.next_power_of_2(total)))
    warps = max(4, triton.next_power_of_2(-(-rows * block * blocks // (32 * _BACKWARD_THREAD))))
    return _Plan(rows, block, max(1, min(_WARPS, warps, rows * block // 32)))


def forward(x, weight, bias, residual, eps, sum_dtype, rms, store, keep):
    """y like x, s = x + residual in `sum_dtype` if `store`; mean (not if rms) and 1 / std a row if `keep`."""
    x, residual = _in_rows(x), _in_rows(residual)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    launch = _forward_launch(looks(x, weight, bias, residual), eps, sum_dtype, rms, store, keep, x.device)
    total = x.numel() // x.shape[-1] if keep else 0
    y = x.new_empty(x.shape)
    s = x.new_empty(x.shape if store else 0, dtype=sum_dtype)
    mean = x.new_empty(0 if rms else total, dtype=torch.float32)
    rstd = x.new_empty(total, dtype=torch.float32)
    with on_device_of(x):
        launch(
            x, residual, weight, bias, y, s if store else None, mean if keep and not rms else None,
            rstd if keep else None,
        )  # fmt: skip
    return y, s, mean, rstd


@functools.lru_cache(maxsize=1024)
def _forward_launch(looks, eps, sum_dtype, rms, store, keep, device):
    x, _, _, residual = named(looks)
    total, width = x.shape[:-1].numel(), x.shape[-1]
    plan = _plan(total, width, _FORWARD_TILE, _FORWARD_THREAD)
    return Launch(
        norm_forward_kernel, (-(-total // plan.rows),),
        _distance(x), _distance(residual), total, eps,
        WIDTH=width, RMS=rms, ROWS=plan.rows, BLOCK=plan.block, num_warps=plan.warps, **early(device),
    )  # fmt: skip


def backward(dy, ds, s, residual, weight, bias, mean, rstd, x_dtype, residual_dtype, rms):
    """Of the norm of s + residual: dx, dresidual (None where dx is the same), dweight, dbias or None."""
    rows = [_in_rows(v) for v in (dy, ds, s, residual)]
    weight = weight.contiguous()
    dresidual_dtype = None if residual_dtype == x_dtype else residual_dtype
    launches = _backward_launches(looks(*rows, weight, bias), x_dtype, dresidual_dtype, rms, dy.device)
    dx = dy.new_empty(dy.shape, dtype=x_dtype)
    dresidual = None if dresidual_dtype is None else dy.new_empty(dy.shape, dtype=dresidual_dtype)
    parts = dy.new_empty(launches.parts, dtype=torch.float32)
    dweight = torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    with on_device_of(dy):
        launches.main(*rows, weight, None if rms else mean, rstd, dx, dresidual, parts)
        launches.add_up(parts, dweight, dbias)
    return dx, dresidual, dweight, dbias


class _Backward(NamedTuple):
    """The launches of a backward, and the shape of what one hands to the other."""

    main: Launch
    add_up: Launch
    parts: tuple


@functools.lru_cache(maxsize=1024)
def _backward_launches(looks, x_dtype, dresidual_dtype, rms, device):
    *rows, _, bias = named(looks)
    total, width = rows[0].shape[:-1].numel(), rows[0].shape[-1]
    plan = _plan_backward(total, width)
    together = _PROGRAMS_A_MULTIPROCESSOR * multiprocessors(torch.empty(0, device=device))
    programs = min(-(-total // plan.rows), together)
    main = Launch(
        norm_backward_kernel, (programs,),
        *map(_distance, rows), total, programs,
        WIDTH=width, RMS=rms, HAS_BIAS=bias is not None, ROWS=plan.rows, BLOCK=plan.block,
        BLOCKS=-(-width // plan.block), num_warps=plan.warps,
    )  # fmt: skip
    parts = (1 if bias is None else 2, programs, width)
    grid = -(-width // 32), parts[0]
    add_up = Launch(sum_parts_kernel, grid, programs, WIDTH=width, ROWS=128, BLOCK=32, num_warps=8)
    return _Backward(main, add_up, parts)


def _in_rows(v):
    """v (..., M) if the kernels can read it as it lies, else a copy."""
    if v is None or v.is_contiguous() or _row_stride(v.shape, v.stride()) is not None:
        return v
    return v.contiguous()


def _distance(look):
    """From row to row of a tensor that is `_in_rows`; 0 for None."""
    return 0 if look is None else _row_stride(look.shape, look.strides)


@functools.lru_cache(maxsize=1024)
def _row_stride(shape, strides):
    """Numbers from row to row of (..., M) with neighbours side by side; None if it does not lie like that."""
    if strides[-1] != 1 and shape[-1] != 1:
        return None
    try:
        return torch.empty_strided(shape, strides, device="meta").view(-1, shape[-1]).stride(0)
    except RuntimeError:  # no distance is the same for all rows
        return None


@triton.jit
def _tile_of(ptr, stride, rows, cols, mask):
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, total, eps,
    WIDTH: tl.constexpr, RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """s = x + residual, y = (s - mean) / sqrt(mean of (s - mean)^2 + eps) · weight + bias; RMS: mean is 0."""
    meet(PDL)
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
def _pieces_of(
    ptr, stride, rows, mask_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """A tuple of BLOCKS tiles (ROWS, BLOCK) that rows are made of; zeros for None."""
    pieces = ()
    for k in tl.static_range(BLOCKS):
        if ptr is None:
            pieces += (tl.zeros((ROWS, BLOCK), tl.float32),)
        else:
            cols = k * BLOCK + tl.arange(0, BLOCK)
            pieces += (_tile_of(ptr, stride, rows, cols, mask_rows[:, None] & (cols < WIDTH)[None, :]),)
    return pieces


@triton.jit
def _store_sums(ptr, sums, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    for k in tl.static_range(BLOCKS):
        cols = k * BLOCK + tl.arange(0, BLOCK)
        tl.store(ptr + cols, tl.sum(sums[k], axis=0), mask=cols < WIDTH)


@triton.jit
def norm_backward_kernel(
    dy_ptr, ds_ptr, s_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr, parts_ptr,
    dy_stride, ds_stride, s_stride, residual_stride, total, programs,
    WIDTH: tl.constexpr, RMS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """dx = ((g - mean(g)) - x̂ mean(g x̂)) / std + ds with g = dy · weight; RMS: without mean(g).

    A row is BLOCKS pieces. parts (1 or 2, programs, WIDTH): this program's sums over rows of dy x̂ (dweight)
    and dy (dbias).
    """
    pid, i = tl.program_id(0), tl.arange(0, ROWS)
    weight = _pieces_of(
        weight_ptr, 0, tl.zeros((1,), tl.int64), tl.full((1,), 1, tl.int1), WIDTH, 1, BLOCK, BLOCKS
    )
    dweight = _pieces_of(None, 0, i, i, WIDTH, ROWS, BLOCK, BLOCKS)
    dbias = dweight
    for first in range(pid * ROWS, total, programs * ROWS):
        mask_rows = i < total - first
        rows = tl.cast(first, tl.int64) + i
        # All that a row is made of is on its way before any of it is needed.
        s = _pieces_of(s_ptr, s_stride, rows, mask_rows, WIDTH, ROWS, BLOCK, BLOCKS)
        residual = _pieces_of(residual_ptr, residual_stride, rows, mask_rows, WIDTH, ROWS, BLOCK, BLOCKS)
        dy = _pieces_of(dy_ptr, dy_stride, rows, mask_rows, WIDTH, ROWS, BLOCK, BLOCKS)
        ds = _pieces_of(ds_ptr, ds_stride, rows, mask_rows, WIDTH, ROWS, BLOCK, BLOCKS)
        rstd = tl.load(rstd_ptr + rows, mask=mask_rows, other=0.0)[:, None]
        mean = tl.zeros((ROWS, 1), tl.float32)
        if not RMS:
            mean = tl.load(mean_ptr + rows, mask=mask_rows, other=0.0)[:, None]
        x_hat, along = (), tl.zeros((ROWS, BLOCK), tl.float32)
        products = along
        for k in tl.static_range(BLOCKS):
            x_hat += ((s[k] + residual[k] - mean) * rstd,)
            along += dy[k] * weight[k]
            products += dy[k] * weight[k] * x_hat[k]
        along_x = tl.sum(products, axis=1)[:, None] / WIDTH
        if not RMS:
            mean = tl.sum(along, axis=1)[:, None] / WIDTH
        weights, biases = (), ()
        for k in tl.static_range(BLOCKS):
            cols = k * BLOCK + tl.arange(0, BLOCK)
            mask = mask_rows[:, None] & (cols < WIDTH)[None, :]
            weights += (dweight[k] + dy[k] * x_hat[k],)
            biases += (dbias[k] + dy[k] if HAS_BIAS else dbias[k],)
            dx = (dy[k] * weight[k] - mean - x_hat[k] * along_x) * rstd + ds[k]
            offs = rows[:, None] * WIDTH + cols[None, :]
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + offs, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
        dweight, dbias = weights, biases
    part_ptr = parts_ptr + tl.cast(pid, tl.int64) * WIDTH
    _store_sums(part_ptr, dweight, WIDTH, BLOCK, BLOCKS)
    if HAS_BIAS:
        _store_sums(part_ptr + tl.cast(programs, tl.int64) * WIDTH, dbias, WIDTH, BLOCK, BLOCKS)


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
