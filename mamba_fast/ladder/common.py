"""What all rungs share and none of them teaches: the import of Triton, softplus, argument checks."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "the ladder's kernels need Triton, which exists for Linux: pip install 'mamba-fast[triton]'"
    ) from error


@triton.jit
def softplus(x):
    """log(1 + e^x) in float32 with full relative accuracy, also where e^x is far below 1.

    log(1 + e^x) = max(x, 0) + log(1 + w) with w = e^-|x|, and log(1 + w) = 2 atanh(s) with
    s = w / (2 + w) <= 1/3: eight terms of the series s + s^3/3 + s^5/5 + ... reach float32.
    """
    w = tl.exp(-tl.abs(x))
    s = w / (2.0 + w)
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    return tl.maximum(x, 0.0) + 2.0 * s * series


def prepare(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None):
    """Check the arguments of a rung; return them in this order, contiguous, the parameters in float32.

    u, delta, z: (B, D, L); A: (D, N); B, C: (B, N, L); D, delta_bias: (D,); initial_state: (B, D, N).
    D, delta_bias and the state are zeros where none is given; the state is a fresh tensor, in which the
    kernel leaves the last state. Raises TypeError or ValueError that names the argument, what was given
    and what is accepted.
    """
    if u.dim() != 3:
        raise ValueError(f"u: got shape {tuple(u.shape)}, expected (batch, d_inner, seqlen)")
    if A.dim() != 2:
        raise ValueError(f"A: got shape {tuple(A.shape)}, expected (d_inner, d_state)")
    (batch, d_inner, seqlen), d_state = u.shape, A.shape[1]
    sequence, variable = (batch, d_inner, seqlen), (batch, d_state, seqlen)
    expected = {
        "u": (u, sequence), "delta": (delta, sequence), "A": (A, (d_inner, d_state)), "B": (B, variable),
        "C": (C, variable), "D": (D, (d_inner,)), "z": (z, sequence), "delta_bias": (delta_bias, (d_inner,)),
        "initial_state": (initial_state, (batch, d_inner, d_state)),
    }  # fmt: skip
    for name, (x, shape) in expected.items():
        if x is None and name in ("D", "z", "delta_bias", "initial_state"):
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {shape}")
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{name}: got {x.dtype}, the ladder accepts float32, float16 and bfloat16")
        if x.device != u.device:
            raise ValueError(f"{name}: is on {x.device}, but u is on {u.device}")
    if u.device.type == "cpu" and isinstance(softplus, triton.runtime.JITFunction):
        raise ValueError("u: is on the CPU; there Triton needs TRITON_INTERPRET=1 before its first import")
    D, delta_bias = (A.new_zeros(d_inner) if x is None else x for x in (D, delta_bias))
    h = torch.zeros(batch, d_inner, d_state, device=u.device)
    if initial_state is not None:
        h.copy_(initial_state)
    u, delta, B, C, z = (None if x is None else x.contiguous() for x in (u, delta, B, C, z))
    A, D, delta_bias = (x.float().contiguous() for x in (A, D, delta_bias))
    return u, delta, A, B, C, D, z, delta_bias, h
