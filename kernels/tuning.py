"""Tile sizes and warps, by op and size: the only place for such numbers.

Every family has its candidates, best first and at most six (``gemm_tiles``), and the function by which launchers ask for
one of them (``gemm_tile``): the first, or what the caller of the launcher chose (``using``). None of these numbers has been
measured yet: they follow from sizes, from the registers and shared memory that compiling shows, and from the count of SMs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Literal

import triton

from .cost_model import TARGETS, buffers, gemm_refusal, gemm_tiles, shared_bytes, target, too_large
from .tiles import (
    CANDIDATES,
    MAX_SPLIT,
    AttentionTile,
    GemmTile,
    PlainTile,
    ProductTile,
    Question,
    T,
    Tile,
    choice,
    recording,
    tile_from_json,
    tile_to_json,
    using,
)

__all__ = [
    "TARGETS",
    "AttentionTile",
    "GemmTile",
    "PlainTile",
    "ProductTile",
    "Question",
    "Tile",
    "gemm_tile",
    "gemm_tiles",
    "recording",
    "shared_bytes",
    "target",
    "tile_from_json",
    "tile_to_json",
    "using",
]

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


def _ranked(best: T, others: Iterable[T], refusal: Callable[[T], str | None]) -> tuple[T, ...]:
    """The best and those of the others that can serve, each once."""
    return tuple(dict.fromkeys([best, *(tile for tile in others if refusal(tile) is None)]))[:CANDIDATES]


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
    return _ranked(best, fits, lambda tile: row_refusal(tile, width))


row_tile = choice("row", PlainTile, row_tiles, row_refusal)


def _plain_refusal(tile: PlainTile, *_: int) -> str | None:
    return too_large(0, tile.rows * tile.cols, tile.num_warps, 0)


def _plain_neighbours(best: PlainTile, rows: int, cols: int) -> tuple[PlainTile, ...]:
    """The best, and with its sides halved and doubled, at most these, and with other warps."""
    others = [
        best._replace(cols=max(best.cols // 2, 1)),
        best._replace(cols=min(best.cols * 2, triton.next_power_of_2(cols))),
        best._replace(rows=max(best.rows // 2, 1)),
        best._replace(rows=min(best.rows * 2, triton.next_power_of_2(rows))),
        best._replace(num_warps=8),
        best._replace(num_warps=2),
    ]
    return _ranked(best, others, _plain_refusal)


@cache
def euler_step_tiles(width: int, actions: int) -> tuple[PlainTile, ...]:
    """rows: actions of a program; cols: how much of the row it takes at a time."""
    best = PlainTile(min(8, triton.next_power_of_2(actions)), min(256, triton.next_power_of_2(width)), 4)
    return _plain_neighbours(best, actions, width)


euler_step_tile = choice("euler_step", PlainTile, euler_step_tiles, _plain_refusal)


@cache
def image_tiles(width: int) -> tuple[PlainTile, ...]:
    """One warp stores 32 neighbouring pixels of a row."""
    return _plain_neighbours(PlainTile(8, min(64, triton.next_power_of_2(width)), 4), 16, width)


image_tile = choice("image", PlainTile, image_tiles, _plain_refusal)


def suffix_embed_refusal(tile: ProductTile, rows: int, width: int, actions: int, cc: int) -> str | None:
    actions = max(16, triton.next_power_of_2(actions))
    # Of fp32: both weights and the bias of a step, x, and the hidden values on their way into the second product.
    loads = buffers(tile.num_stages, target(cc)) * tile.inner * (actions + tile.cols + tile.rows)
    needed = 4 * (loads + tile.rows * (actions + tile.inner)) + (4 << 10)
    return too_large(needed, tile.rows * (tile.cols + tile.inner), tile.num_warps, cc)


@cache
def suffix_embed_tiles(rows: int, width: int, actions: int, cc: int) -> tuple[ProductTile, ...]:
    """Short tiles: 50 tokens and 720 columns make 92 programs."""
    best = ProductTile(16, 32, 64 if cc >= 80 else 32, 4, 2)
    others = [
        best._replace(inner=best.inner // 2, num_stages=3),
        best._replace(inner=best.inner * 2),
        best._replace(cols=16),
        best._replace(cols=64),
        best._replace(rows=32),
        best._replace(num_warps=8),
    ]
    return _ranked(best, others, lambda tile: suffix_embed_refusal(tile, rows, width, actions, cc))


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
    return _ranked(best, others, lambda tile: suffix_fold_refusal(tile, width, actions, times, cc))


suffix_fold_tile = choice("suffix_fold", ProductTile, suffix_fold_tiles, suffix_fold_refusal)


@cache
def prefix_embed_tiles(state: int, width: int) -> tuple[PlainTile, ...]:
    """rows: how much of the state is projected at a time; cols: columns of a program."""
    best = PlainTile(min(16, triton.next_power_of_2(state)), min(256, triton.next_power_of_2(width)), 4)
    return _plain_neighbours(best, state, width)


prefix_embed_tile = choice("prefix_embed", PlainTile, prefix_embed_tiles, _plain_refusal)


def attention_shared_bytes(
    tile: AttentionTile, block_dim: int, narrow: bool, cc: int, backward: bool = False
) -> int:
    """The most shared memory that a program needs; in the backward rows are of q and of the gradient."""
    rows, keys = (1 + backward) * tile.rows * block_dim, 2 * tile.keys * block_dim
    stages = buffers(tile.num_stages, target(cc))
    if narrow and tile.num_stages == 1 and not backward:
        keys //= 2  # values come where keys were, into registers first
    # Rows stay while keys stream through; in one kernel of the backward it is the other way round.
    values = max(rows + stages * keys, keys + stages * (rows + 3 * tile.rows) if backward else 0)
    return (2 if narrow else 4) * (values + tile.rows * tile.keys) + (1 << 10)


def attention_refusal(tile: AttentionTile, *sizes: int, backward: bool = False) -> str | None:
    """sizes: as of the candidates, for which all end in block_dim, narrow and cc."""
    block_dim, narrow, cc = sizes[-3], bool(sizes[-2]), sizes[-1]
    needed = attention_shared_bytes(tile, block_dim, narrow, cc, backward)
    sums = tile.rows * (block_dim + tile.keys)
    if backward:
        sums = 2 * (max(tile.rows, tile.keys) * block_dim + tile.rows * tile.keys)
    return too_large(needed, sums, tile.num_warps, cc)


def _attention_neighbours(
    best: AttentionTile, rows: int, keys: int, block_dim: int, narrow: bool, cc: int, backward: bool = False
) -> tuple[AttentionTile, ...]:
    """The best, and with its sides halved and doubled, as long as there are rows and keys, other warps, other stages."""

    # 16 384 numbers of keys fill 32 KB, as in the best of the masked one.
    most_keys = min(triton.next_power_of_2(keys), 16_384 // block_dim)

    def refusal(tile: AttentionTile) -> str | None:
        if not (16 <= tile.rows <= triton.next_power_of_2(rows) and 16 <= tile.keys <= most_keys):
            return "does not suit so few rows and keys"
        if tile.keys >= keys and tile.num_stages > 1:
            return "has no second block of keys to load in advance"
        return attention_refusal(tile, block_dim, narrow, cc, backward=backward)

    more, fewer = min(best.num_stages + 1, 3), max(best.num_stages - 1, 1)
    changes: list[dict[str, int]] = [
        dict(keys=best.keys // 2, num_stages=more),
        dict(keys=best.keys * 2, num_stages=fewer),
        dict(rows=best.rows // 2),
        dict(rows=best.rows * 2, num_warps=8),
        dict(num_warps=12 - best.num_warps),
        dict(num_stages=more),
        dict(num_stages=fewer),
    ]
    return _ranked(best, (best._replace(**change) for change in changes), refusal)


@cache
def attention_backward_tiles(block_dim: int, narrow: bool, cc: int) -> tuple[AttentionTile, ...]:
    """narrow: products of 16 bits. Four products share a tile's registers, so tiles stay small."""
    best = AttentionTile(16, 16 if block_dim > 64 else 32, 8, 1)
    if narrow and block_dim <= 64:
        best = AttentionTile(32, 32, 4, 2)
    most = 64 if narrow else 32
    return _attention_neighbours(best, most, most, block_dim, narrow, cc, backward=True)


attention_backward_tile = choice(
    "attention_backward", AttentionTile, attention_backward_tiles, partial(attention_refusal, backward=True)
)


@cache
def masked_attention_tiles(
    heads: int, rows: int, keys: int, block_dim: int, narrow: bool, cc: int
) -> tuple[AttentionTile, ...]:
    """heads: batch times KV heads; rows: tokens times query heads of one KV head; narrow: products of 16 bits on
    tensor cores.

    Tiles of 16 rows as long as all of them start at once, two a multiprocessor; beyond that they grow.
    """
    if not narrow:
        # Without tensor cores more threads share a tile.
        best = AttentionTile(16, 64 if block_dim <= 64 else 32, 4 if cc >= 80 else 8, 1)
        return _attention_neighbours(best, min(rows, 32), keys, block_dim, narrow, cc)
    tile = 16
    while tile < 64 and heads * triton.cdiv(rows, tile) > 2 * target(cc).multiprocessors:
        tile *= 2
    if tile == 64:  # enough programs: rows share the keys they stream, as in the vision tower
        best = AttentionTile(tile, 64, 4, 2)
    else:
        # Up to 32 KB of keys and as much of values: at a head size of 64 all 227 keys of a denoise step in one block.
        block = min(max(16, triton.next_power_of_2(keys)), 16_384 // block_dim)
        best = AttentionTile(tile, block, 4 if tile == 16 else 8, 1 if block >= keys else 2)
    return _attention_neighbours(best, min(rows, 128), keys, block_dim, narrow, cc)


masked_attention_tile = choice("masked_attention", AttentionTile, masked_attention_tiles, attention_refusal)


def attention_residual_refusal(
    tile: ProductTile,
    tokens: int,
    outputs: int,
    keys: int,
    kv_heads: int,
    width: int,
    group: int,
    bytes_: int,
    cc: int,
) -> str | None:
    if kv_heads > MAX_SPLIT:
        return f"would share the product between {kv_heads} programs; accepted are at most {MAX_SPLIT}"
    block_dim, rows = width // group, tile.rows * group
    attention = bytes_ * (rows * (block_dim + tile.inner) + 2 * tile.inner * block_dim)
    product = bytes_ * width * (tile.rows + tile.cols)
    sums = max(rows * (block_dim + tile.inner), tile.rows * tile.cols + width * tile.cols * bytes_ // 4)
    return too_large(max(attention, product) + (1 << 10), sums, tile.num_warps, cc)


@cache
def attention_residual_tiles(
    tokens: int, outputs: int, keys: int, kv_heads: int, width: int, group: int, bytes_: int, cc: int
) -> tuple[ProductTile, ...]:
    """rows: tokens; cols: outputs; inner: keys of a block. width, group: columns of the product and query heads of one KV
    head, padded; bytes_: of the widest operand.

    Programs for most multiprocessors: the tiles of columns attend each for itself.
    """
    sizes = (tokens, outputs, keys, kv_heads, width, group, bytes_, cc)
    narrow = bytes_ == 2
    most = triton.next_power_of_2(keys)
    best = ProductTile(16, 128 if narrow else 32, min(max(most, 16), 64 if narrow else 16), 8, 1)
    others = [
        best._replace(cols=best.cols // 2),
        best._replace(inner=best.inner * 2),
        best._replace(num_warps=4),
        best._replace(cols=best.cols // 2, num_warps=4),
        best._replace(num_stages=2),
        ProductTile(16, 16, 16, 4, 1),
    ]
    fit = [tile for tile in (best, *others) if attention_residual_refusal(tile, *sizes) is None]
    if not fit:
        raise ValueError(
            f"attention_residual: {group} query heads of {width // group} for a KV head, {kv_heads} KV heads: "
            "too large for a tile; masked_attention and linear_residual serve them"
        )
    return tuple(dict.fromkeys(fit))[:CANDIDATES]


attention_residual_tile = choice(
    "attention_residual", ProductTile, attention_residual_tiles, attention_residual_refusal
)


@cache
def attention_tiles(tokens: int, block_dim: int, narrow: bool, cc: int) -> tuple[AttentionTile, ...]:
    """tokens: patches of an image; narrow: products of 16 bits on tensor cores."""
    rows = max(16, min(triton.next_power_of_2(tokens), 128))
    if not narrow:
        best = AttentionTile(min(rows, 32 if block_dim <= 64 else 16), 32, 8, 1)
        return _attention_neighbours(best, min(rows, 32), tokens, block_dim, narrow, cc)
    best = AttentionTile(rows, 64, 8 if rows == 128 else 4, 3 if block_dim <= 64 else 2)
    return _attention_neighbours(best, rows, tokens, block_dim, narrow, cc)


attention_tile = choice("attention", AttentionTile, attention_tiles, attention_refusal)
