"""Tile sizes and warps, by op and size: the only place for such numbers.

Every family has its candidates, best first and at most six (``gemm_tiles``), and the function by which launchers ask for
one of them (``gemm_tile``): the first, or what the caller of the launcher chose (``using``). These numbers follow from
sizes, from the registers and shared memory that compiling shows, and from the count of SMs; those of products also from the
rates that an H200 showed (``cost_model``). The order of the candidates was not measured.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import triton

from .cost_model import buffers, gemm_refusal, gemm_tiles, target, too_large
from .tiles import GemmTile, PlainTile, ProductTile, choice, ranked

# A program keeps a whole row in registers: 16 384 fp32 values fill a quarter of a multiprocessor's.
MAX_ROW = 16_384
# A padded head of 128 with its keys still fits in the 99 KB of shared memory of the smallest target above 8.0.
MAX_HEAD_DIM = 128
# Heads and cross KV are fp32 in LeRobot's default checkpoints. Three products of tf32 parts have about fp32's accuracy and
# run on tensor cores; Triton's interpreter computes them as ieee.
ON_TENSOR_CORES: Literal["tf32x3"] = "tf32x3"


def head_block(head_dim: int) -> int:
    """The padded head size. Raises ValueError outside 1 .. MAX_HEAD_DIM."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"a head size of {head_dim} has no tile; accepted are 1 to {MAX_HEAD_DIM}")
    return max(16, triton.next_power_of_2(head_dim))


def fp32_precision(cc: int) -> Literal["tf32x3", "ieee"]:
    """How products of fp32 operands run in heads and attention: below 8.0 there is no tf32."""
    return ON_TENSOR_CORES if cc >= 80 else "ieee"


gemm_tile = choice("gemm", GemmTile, gemm_tiles, gemm_refusal)


def row_refusal(tile: PlainTile, width: int) -> str | None:
    if tile.rows != 1 or not width <= tile.cols <= MAX_ROW:
        return (
            f"cannot hold one row of {width}; accepted are 1x{triton.next_power_of_2(width)} to 1x{MAX_ROW}"
        )
    return _plain_refusal(tile)


@cache
def row_tiles(width: int) -> tuple[PlainTile, ...]:
    """Of an op that takes one row a program. Raises ValueError above MAX_ROW."""
    if width > MAX_ROW:
        raise ValueError(f"rows of {width} columns do not fit in registers; accepted are at most {MAX_ROW}")
    block = triton.next_power_of_2(width)
    # Eight values a thread: one 16-byte load of bf16.
    best = PlainTile(1, block, min(max(block // 256, 1), 16))
    others = [best._replace(num_warps=warps) for warps in (best.num_warps // 2, best.num_warps * 2, 4, 8)]
    fits = [tile for tile in others if 1 <= tile.num_warps <= min(16, max(block // 32, 1))]
    return ranked(best, fits, lambda tile: row_refusal(tile, width))


row_tile = choice("row", PlainTile, row_tiles, row_refusal)


def norm_refusal(tile: PlainTile, rows: int, width: int, cc: int) -> str | None:
    return row_refusal(tile._replace(rows=1), width) or _plain_refusal(tile)


@cache
def norm_tiles(rows: int, width: int, cc: int) -> tuple[PlainTile, ...]:
    """Of an op that takes whole rows: as many a program as leave every multiprocessor one, for they share the norm's weight.
    Raises ValueError above MAX_ROW."""
    one = row_tiles(width)[0]
    number = 1
    while number < 8 and rows >= 2 * number * target(cc).multiprocessors and 2 * number * one.cols <= 8192:
        number *= 2
    # 16 values a thread: with 32 some targets spill
    best = one._replace(rows=number, num_warps=min(16, max(one.num_warps, number * one.cols // 512)))
    others = [
        best._replace(rows=max(number // 2, 1)),
        best._replace(rows=max(number // 2, 1), num_warps=max(best.num_warps // 2, 1)),
        best._replace(num_warps=4),
        best._replace(num_warps=8),
        one,
    ]
    return ranked(best, others, lambda tile: norm_refusal(tile, rows, width, cc))


norm_tile = choice("norm", PlainTile, norm_tiles, norm_refusal)


def _plain_refusal(tile: PlainTile, *_: int) -> str | None:
    return too_large(0, tile.rows * tile.cols, tile.num_warps, 0)


def _plain_neighbours(best: PlainTile, rows: int, cols: int) -> tuple[PlainTile, ...]:
    """The best, and with its sides halved and doubled, at most these, and with other warps."""
    others = [
        best._replace(cols=max(best.cols // 2, 1)),
        best._replace(cols=min(best.cols * 2, triton.next_power_of_2(cols))),
        best._replace(rows=max(best.rows // 2, 1)),
        best._replace(rows=min(best.rows * 2, triton.next_power_of_2(rows))),
        best._replace(num_warps=12 - best.num_warps),
        best._replace(num_warps=2),
    ]
    return ranked(best, others, _plain_refusal)


@cache
def euler_step_tiles(width: int, actions: int) -> tuple[PlainTile, ...]:
    """rows: actions of a program; cols: how much of the row it takes at a time."""
    best = PlainTile(min(8, triton.next_power_of_2(actions)), min(512, triton.next_power_of_2(width)), 8)
    return _plain_neighbours(best, actions, width)


euler_step_tile = choice("euler_step", PlainTile, euler_step_tiles, _plain_refusal)


@cache
def image_tiles(width: int) -> tuple[PlainTile, ...]:
    """One warp stores 32 neighbouring pixels of a row."""
    return _plain_neighbours(PlainTile(8, min(64, triton.next_power_of_2(width)), 4), 16, width)


image_tile = choice("image", PlainTile, image_tiles, _plain_refusal)


def suffix_embed_refusal(tile: ProductTile, rows: int, width: int, actions: int, cc: int) -> str | None:
    actions = max(16, triton.next_power_of_2(actions))
    # Of fp32, one behind the other on their way between layouts: a weight, or both halves of the hidden values or of x.
    needed = 4 * max(tile.inner * max(tile.cols, actions), 2 * tile.rows * max(tile.inner, actions)) + (
        4 << 10
    )
    sums = tile.rows * (tile.cols + tile.inner) + tile.inner * (tile.cols + actions)
    return too_large(needed, sums, tile.num_warps, cc)


@cache
def suffix_embed_tiles(rows: int, width: int, actions: int, cc: int) -> tuple[ProductTile, ...]:
    """inner: the hidden values of a program, which takes one turn. Small, so that a warp has little to do behind the wait:
    50 tokens and 720 columns of 720 hidden values make 576 programs, of which a multiprocessor holds four."""
    best = ProductTile(16, 64, 64, 8, 1) if cc >= 80 else ProductTile(16, 32, 32, 4, 1)
    others = [
        best._replace(inner=best.inner * 2),
        best._replace(cols=best.cols * 2, num_warps=best.num_warps * 2),
        best._replace(cols=best.cols * 2, inner=best.inner * 2, num_warps=best.num_warps * 2),
        best._replace(rows=32),
        best._replace(num_warps=best.num_warps // 2),
    ]
    return ranked(best, others, lambda tile: suffix_embed_refusal(tile, rows, width, actions, cc))


suffix_embed_tile = choice("suffix_embed", ProductTile, suffix_embed_tiles, suffix_embed_refusal)


def suffix_fold_refusal(tile: ProductTile, width: int, actions: int, times: int, cc: int) -> str | None:
    # Of fp32: both halves of the weight, and what they meet.
    needed = 4 * buffers(tile.num_stages, target(cc)) * tile.inner * (2 * tile.rows + tile.cols) + (4 << 10)
    return too_large(needed, tile.rows * (tile.inner + tile.cols), tile.num_warps, cc)


@cache
def suffix_fold_tiles(width: int, actions: int, times: int, cc: int) -> tuple[ProductTile, ...]:
    """Small tiles: 720 outputs, 32 actions and 10 times make 135 programs, one a multiprocessor."""
    best = ProductTile(16, 16, 32, 4, 4)
    others = [
        best._replace(inner=64, num_warps=8, num_stages=3),
        best._replace(num_warps=2),
        best._replace(cols=32),
        best._replace(rows=32),
    ]
    return ranked(best, others, lambda tile: suffix_fold_refusal(tile, width, actions, times, cc))


suffix_fold_tile = choice("suffix_fold", ProductTile, suffix_fold_tiles, suffix_fold_refusal)


@cache
def prefix_embed_tiles(state: int, width: int) -> tuple[PlainTile, ...]:
    """rows: how much of the state is projected at a time; cols: columns of a program."""
    best = PlainTile(min(16, triton.next_power_of_2(state)), min(256, triton.next_power_of_2(width)), 4)
    return _plain_neighbours(best, state, width)


prefix_embed_tile = choice("prefix_embed", PlainTile, prefix_embed_tiles, _plain_refusal)
