"""One step of the recurrence in Triton: every state is read once and written once.

A program holds a tile of BLOCK_B sequences, BLOCK_P channels and all N states in registers. The
sequences of a tile share their channels' A.
"""

import torch
import triton
import triton.language as tl

from mamba_fast.ops.rooms import multiprocessors, on_device_of
from mamba_fast.ops.selective_scan.triton_tiles import sigmoid, softplus

_TILE = 1024  # states a program
_THREAD = 32  # states a thread, all on their way from memory at the same time
_SEQUENCES = 2  # of one tile; more read A less often, fewer make more programs
_SMALLEST = 256  # states a program: one load of 16 bytes a thread in bfloat16
_PROGRAMS_A_MULTIPROCESSOR = 16  # below that, a tile has one sequence and fewer channels
LOG2E = tl.constexpr(1.4426950408889634)


def update(state, x, dt, A, B, C, D, z, dt_bias, softplus, indices):
    """y like x; state (S, P, N) or (S, H, P, N) is updated in place."""
    heads, channels, d_state = (1, *A.shape)[-3:]
    batch = x.shape[0]
    tied = A.stride(-1) == A.stride(-2) == dt.stride(-1) == 0
    tied = tied and (dt_bias is None or dt_bias.stride(-1) == 0)
    block_n = _power_of_2(d_state)
    block_b, block_p = _tile(x, batch, heads, channels, block_n, tied)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid = (-(-channels // block_p) * heads * -(-batch // block_b),)
    with on_device_of(x):
        update_kernel[grid](
            state, x, dt, A, B, C, D, z, dt_bias, indices, y,
            _strides(state, 4), _strides(x, 3), _strides(dt, 3), _strides(A, 3, True), _strides(B, 3),
            _strides(C, 3), _strides(D, 2, True), _strides(z, 3), _strides(dt_bias, 2, True),
            batch, heads, channels, heads // (B.shape[1] if B.dim() == 3 else 1),
            heads // (C.shape[1] if C.dim() == 3 else 1),
            N=d_state, SOFTPLUS=softplus, TIED=tied, BLOCK_B=block_b, BLOCK_P=block_p, BLOCK_N=block_n,
            num_warps=max(1, min(16, block_b * block_p * block_n // (32 * _THREAD))),
        )  # fmt: skip
    return y


def _tile(x, batch, heads, channels, block_n, tied):
    """(BLOCK_B, BLOCK_P): _TILE states, shared by sequences; smaller where that leaves the chip idle."""
    wanted = _PROGRAMS_A_MULTIPROCESSOR * multiprocessors(x)
    block_p = max(1, min(_TILE // block_n, _power_of_2(channels)))
    programs = batch * heads * -(-channels // block_p)
    if programs >= wanted:
        share = not tied and batch >= _SEQUENCES and block_p >= 2 * _SEQUENCES
        return (_SEQUENCES, block_p // _SEQUENCES) if share else (1, block_p)
    while programs < wanted and block_p * block_n > _SMALLEST:
        programs, block_p = 2 * programs, block_p // 2
    return 1, block_p


def _power_of_2(size):
    """The next one; Triton's own function takes as long as PyTorch needs to allocate y."""
    return 1 << (size - 1).bit_length()


def _strides(tensor, dims, parameter=False):
    """Strides with a head (B, C: a group) axis, of stride 0 where the tensor has none."""
    if tensor is None:
        return (0,) * dims
    strides = tensor.stride()
    if len(strides) == dims:
        return strides
    return (0, *strides) if parameter else (strides[0], 0, *strides[1:])


@triton.jit
def update_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, indices_ptr, y_ptr,
    state_strides, x_strides, dt_strides, A_strides, B_strides, C_strides, D_strides, z_strides, bias_strides,
    batch, heads, channels, B_span, C_span,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, TIED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h = exp(Δ A) h + Δ B x in place, y = (C h + D x) SiLU(z), for BLOCK_B sequences, BLOCK_P channels."""
    blocks = tl.cdiv(channels, BLOCK_P)
    pid = tl.program_id(0)
    h, first_b = (pid // blocks) % heads, (pid // (blocks * heads)) * BLOCK_B
    p, b, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_N)
    mask_p, mask_b, mask_n = p < channels - (pid % blocks) * BLOCK_P, b < batch - first_b, n < N
    h, b, p = h.to(tl.int64), first_b.to(tl.int64) + b, (pid % blocks).to(tl.int64) * BLOCK_P + p
    row, live = b, mask_b
    if indices_ptr is not None:
        row = tl.load(indices_ptr + b, mask=mask_b, other=-1).to(tl.int64)
        live = row >= 0  # a negative index is padding: nothing is read, 0 is written
    mask = live[:, None] & mask_p[None, :]
    mask_state, mask_A, mask_B = mask[:, :, None], mask_p[:, None], live[:, None]
    if BLOCK_N != N:
        mask_state, mask_A = mask_state & mask_n[None, None, :], mask_A & mask_n[None, :]
        mask_B = mask_B & mask_n[None, :]
    state_ptrs = _at(state_ptr, row, h, p, state_strides)[:, :, None] + n[None, None, :] * state_strides[3]
    state = tl.load(state_ptrs, mask=mask_state, other=0.0).to(tl.float32)
    x = tl.load(_at(x_ptr, b, h, p, x_strides), mask=mask, other=0.0).to(tl.float32)
    B = tl.load(_at(B_ptr, b, h // B_span, n, B_strides), mask=mask_B, other=0.0).to(tl.float32)
    C = tl.load(_at(C_ptr, b, h // C_span, n, C_strides), mask=mask_B, other=0.0).to(tl.float32)
    if TIED:  # one Δ and one A a head: one exponential a sequence
        Delta = tl.load(dt_ptr + b * dt_strides[0] + h * dt_strides[1], mask=live, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            Delta += tl.load(bias_ptr + h * bias_strides[0]).to(tl.float32)
        if SOFTPLUS:
            Delta = softplus(Delta)
        A = tl.load(A_ptr + h * A_strides[0]).to(tl.float32) * LOG2E
        Delta = Delta[:, None]
        decay = tl.exp2(Delta * A)[:, :, None]
    else:
        Delta = tl.load(_at(dt_ptr, b, h, p, dt_strides), mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            Delta += _of_channels(bias_ptr, h, p, bias_strides, mask_p)
        if SOFTPLUS:
            Delta = softplus(Delta)
        A_ptrs = A_ptr + h * A_strides[0] + p[:, None] * A_strides[1] + n[None, :] * A_strides[2]
        A = tl.load(A_ptrs, mask=mask_A, other=0.0).to(tl.float32) * LOG2E
        decay = tl.exp2(Delta[:, :, None] * A[None, :, :])
    state = decay * state + (Delta * x)[:, :, None] * B[:, None, :]
    tl.store(state_ptrs, state.to(state_ptr.dtype.element_ty), mask=mask_state)
    y = tl.sum(state * C[:, None, :], axis=2)
    if D_ptr is not None:
        y += x * _of_channels(D_ptr, h, p, D_strides, mask_p)
    if z_ptr is not None:
        z = tl.load(_at(z_ptr, b, h, p, z_strides), mask=mask, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    if indices_ptr is not None:
        y = tl.where(mask, y, 0.0)
    y_ptrs = y_ptr + (b[:, None] * heads + h) * channels + p[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_b[:, None] & mask_p[None, :])


@triton.jit
def _at(ptr, b, h, i, strides):
    """Addresses (BLOCK_B, .) of a tensor with a batch axis, a head or group axis and a last one."""
    return ptr + h * strides[1] + b[:, None] * strides[0] + i[None, :] * strides[2]


@triton.jit
def _of_channels(ptr, h, p, strides, mask_p):
    """D or dt_bias, (1, BLOCK_P)."""
    value = tl.load(ptr + h * strides[0] + p * strides[1], mask=mask_p, other=0.0)
    return value.to(tl.float32)[None, :]
