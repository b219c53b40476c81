"""Tiles of attention, by size: see ``tuning``."""

from __future__ import annotations

from functools import cache, partial

import triton

from .cost_model import buffers, target, too_large
from .tiles import CANDIDATES, MAX_SPLIT, AttentionTile, ProductTile, choice, ranked


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
    return ranked(best, (best._replace(**change) for change in changes), refusal)


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


COLS_AT_ONCE = 128
"""Of the product behind a tile's attention. Wider tiles take several steps: a slice of the weight has to fit registers."""


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
    cols = min(tile.cols, COLS_AT_ONCE)
    block_dim, rows = width // group, tile.rows * group
    attention = bytes_ * (rows * (block_dim + tile.inner) + 2 * tile.inner * block_dim)
    product = bytes_ * width * (tile.rows + cols)
    sums = max(rows * (block_dim + tile.inner), tile.rows * cols + width * cols * bytes_ // 4)
    return too_large(max(attention, product) + (1 << 10), sums, tile.num_warps, cc)


@cache
def attention_residual_tiles(
    tokens: int, outputs: int, keys: int, kv_heads: int, width: int, group: int, bytes_: int, cc: int
) -> tuple[ProductTile, ...]:
    """rows: tokens; cols: outputs; inner: keys of a block. width, group: columns of the product and query heads of one KV
    head, padded; bytes_: of the widest operand.

    Few, wide tiles: each of its own computes attention once more.
    """
    sizes = (tokens, outputs, keys, kv_heads, width, group, bytes_, cc)
    # Each tile of columns attends anew, so tiles are wide. On Hopper scores of 128 keys fit in registers.
    narrow, hopper = bytes_ == 2, cc == 90
    most = (128 if hopper else 64) if narrow else 16
    inner = min(max(triton.next_power_of_2(keys), 16), most)
    best = ProductTile(16, (256 if hopper else 128) if narrow else 32, inner, 8, 1)
    others = [
        best._replace(inner=max(best.inner // 2, 16)),
        best._replace(cols=best.cols // 2),
        best._replace(rows=32, cols=64, inner=min(best.inner, 64)),
        best._replace(cols=best.cols // 2, inner=max(best.inner // 2, 16)),
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
