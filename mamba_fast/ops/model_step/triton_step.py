"""A step of many sequences: six Triton kernels a layer, each begun while the one before it ends."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from mamba_fast.ops.causal_conv1d.triton_update import conv_token_kernel
from mamba_fast.ops.model_step.triton_layer import norm_kernel, product_kernel, recur_kernel
from mamba_fast.ops.rooms import on_device_of, shared_limit
from mamba_fast.ops.triton_chain import early
from mamba_fast.ops.triton_launch import Launch

AHEAD = 1024  # bytes of a row of weights that are asked for before the vectors are there


class Tile(NamedTuple):
    """`m` sequences by `n` channels of a program; k columns at a time, `stages` of them on their way.

    parts: programs that share the columns.
    """

    m: int
    n: int
    k: int = 1
    warps: int = 4
    stages: int = 1
    parts: int = 1


class Tiles(NamedTuple):
    """Of in_proj, the convolution, x_proj, the recurrence with dt_proj, and out_proj."""

    widen: Tile
    conv: Tile = Tile(2, 256)
    ranks: Tile = Tile(16, 16, 256, stages=3, parts=2)
    recur: Tile = Tile(16, 32, 32, stages=5)
    narrow: Tile = Tile(16, 32, 256, stages=3, parts=3)


def tiles_for(batch):
    rows = next(n for n in (16, 32, 64, 128) if n >= batch)
    widen = Tile(rows, 64, 64, stages=4, parts=2)
    return Tiles(widen) if rows == 16 else Tiles(widen, narrow=Tile(rows, 32, 128, stages=3, parts=4))


def step(weights, tokens, states):
    """logits (B, V) of tokens (B,) int64; states [(conv_state, ssm_state)] are changed in place."""
    batch, (E, D), device = len(tokens), weights.layers[0].out_proj.shape, tokens.device
    R, N, new = weights.dt_rank, weights.d_state, weights.head.new_empty
    types = weights.head.dtype, *(v.dtype for v in states[0]), weights.layers[0].conv_bias is None
    run = _launches(batch, E, D, R, N, weights.eps, types, device)
    tiles = run.tiles

    def parts(tile, columns):
        return torch.empty(tile.parts, batch, columns, dtype=torch.float32, device=device)

    h, u, y, residual = new(batch, E), new(batch, D), new(batch, D), parts(Tile(1, 1), E)
    xz, ranks, out = parts(tiles.widen, 2 * D), parts(tiles.ranks, R + 2 * N), parts(tiles.narrow, E)
    norm = run.first
    with on_device_of(tokens):
        for layer, (conv_state, ssm_state) in zip(weights.layers, states, strict=True):
            norm(tokens, weights.embedding, out, residual, layer.norm, h)
            run.widen(h, layer.in_proj, xz)
            run.conv(xz, layer.conv, layer.conv_bias, None, conv_state, u)
            run.ranks(u, layer.x_proj, ranks)
            scan = layer.dt_proj, layer.dt_bias, layer.A_log, layer.D
            run.recur(ranks, *scan, u, xz, ssm_state, y)
            run.narrow(y, layer.out_proj, out)
            norm = run.norm
        norm(tokens, weights.embedding, out, residual, weights.norm_f, h)
    return F.linear(h, weights.head)


class _Launches(NamedTuple):
    tiles: Tiles
    first: Launch
    norm: Launch
    widen: Launch
    conv: Launch
    ranks: Launch
    recur: Launch
    narrow: Launch


@functools.lru_cache(maxsize=64)
def _launches(batch, E, D, R, N, eps, types, device):
    """The launches of a layer; `types` of weights and states play a part as a key alone."""
    limit = shared_limit(device)
    tiles = Tiles(*(_fitting(tile, limit) for tile in tiles_for(batch)))

    def options(tile):
        return {"num_warps": tile.warps, "num_stages": tile.stages} | early(device)

    def grid(tile, channels):
        return -(-channels // tile.n), -(-batch // tile.m), tile.parts

    def norm(parts):
        block = triton.next_power_of_2(E)
        wide = options(Tile(1, 1, warps=8 if block > 1024 else 4))
        return Launch(norm_kernel, (batch,), batch, eps, E=E, PARTS=parts, BLOCK_E=block, **wide)

    def product(tile, rows, columns):
        share = -(-columns // (tile.parts * tile.k)) * tile.k
        return Launch(
            product_kernel, grid(tile, rows), batch, K=columns, ROWS=rows, SHARE=share,
            AHEAD=_ahead(tile, columns - (tile.parts - 1) * share), BLOCK_M=tile.m, BLOCK_N=tile.n,
            BLOCK_K=tile.k, WARPS=tile.warps, **options(tile),
        )  # fmt: skip

    conv, recur = tiles.conv, tiles.recur
    return _Launches(
        tiles, norm(0), norm(tiles.narrow.parts),
        product(tiles.widen, 2 * D, E),
        Launch(
            conv_token_kernel, (-(-batch // conv.m), -(-D // conv.n)), batch, 2 * D, 2 * D * batch, D, -1,
            CHANNELS=D, SILU=True, PARTS=tiles.widen.parts, KNOWN=True, BLOCK_M=conv.m, BLOCK_D=conv.n,
            **options(conv),
        ),
        product(tiles.ranks, R + 2 * N, D),
        Launch(
            recur_kernel, grid(recur, D), batch, D=D, R=R, N=N, RANKS=tiles.ranks.parts,
            XZ=tiles.widen.parts, BLOCK_M=recur.m, BLOCK_D=recur.n, BLOCK_R=recur.k,
            BLOCK_N=triton.next_power_of_2(N), **options(recur),
        ),
        product(tiles.narrow, E, D),
    )  # fmt: skip


def _fitting(tile, limit):
    """`tile` with as many stages as fit into the shared memory of a program."""
    return tile._replace(stages=max(1, min(tile.stages, limit // (2 * tile.k * (tile.m + tile.n)))))


def _ahead(tile, columns):
    """Bytes of a row to ask for, of which there are `columns` numbers at least: the same for each thread."""
    pieces = 32 * tile.warps // tile.n
    return min(AHEAD, 2 * columns) // pieces // 16 * 16 * pieces
