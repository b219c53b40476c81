"""Tile sizes and warps, by op and size: the only place for such numbers."""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import triton

# A program keeps a whole row in registers: 16 384 fp32 values fill a quarter of a multiprocessor's.
MAX_ROW = 16_384


def row_tile(width: int) -> tuple[int, int]:
    """(BLOCK_COLS, num_warps) of an op that takes one row a program. Raises ValueError above MAX_ROW."""
    if width > MAX_ROW:
        raise ValueError(f"rows of {width} columns do not fit in registers; accepted are at most {MAX_ROW}")
    block = triton.next_power_of_2(width)
    # Eight values a thread: one 16-byte load of bf16.
    return block, min(max(block // 256, 1), 16)


# Attention, layer norm, the two ends of a denoise step, camera frames. None of these numbers has been measured yet:
# they follow from sizes, from the registers and shared memory that compiling shows, and from the count of SMs.


class AttentionTile(NamedTuple):
    rows: int
    keys: int
    num_warps: int
    num_stages: int


class ProductTile(NamedTuple):
    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int


class PlainTile(NamedTuple):
    rows: int
    cols: int
    num_warps: int


# A padded head of 128 with its keys still fits in the 99 KB of shared memory of the smallest target above 8.0.
MAX_HEAD_DIM = 128
# Cross KV is fp32 in LeRobot's default checkpoints: products of fp32 operands round as fp32.
ATTENTION_PRECISION = "ieee"
# Heads are fp32 as well. Three products of tf32 parts have about fp32's accuracy and run on tensor cores. Off a GPU they
# are computed as ieee, so what they round to on a device is for the tests there to say.
HEAD_PRECISION: Literal["tf32x3"] = "tf32x3"


def head_block(head_dim: int) -> int:
    """The padded head size. Raises ValueError outside 1 .. MAX_HEAD_DIM."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"a head size of {head_dim} has no tile; accepted are 1 to {MAX_HEAD_DIM}")
    return max(16, triton.next_power_of_2(head_dim))


def head_precision(cc: int) -> Literal["tf32x3", "ieee"]:
    """How products of fp32 operands run in the heads: below 8.0 there is no tf32."""
    return HEAD_PRECISION if cc >= 80 else "ieee"


def attention_backward_tile(block_dim: int, narrow: bool) -> AttentionTile:
    """narrow: products of 16 bits. Four products share a tile's registers, so tiles stay small; not measured yet."""
    if narrow and block_dim <= 64:
        return AttentionTile(32, 32, 4, 2)
    return AttentionTile(16, 16 if block_dim > 64 else 32, 8, 1)


def masked_attention_tile(
    heads: int, rows: int, keys: int, block_dim: int, narrow: bool, cc: int
) -> AttentionTile:
    """heads: batch times KV heads; rows: tokens times query heads of one KV head; narrow: products of 16 bits on
    tensor cores.

    Tiles of 16 rows as long as all of them start at once, two a multiprocessor; beyond that they grow.
    """
    if not narrow:
        return AttentionTile(16, 64 if block_dim <= 64 else 32, 8, 1)
    tile = 16
    while tile < 64 and heads * triton.cdiv(rows, tile) > 2 * target(cc).multiprocessors:
        tile *= 2
    if tile == 64:  # enough programs: rows share the keys they stream, as in the vision tower
        return AttentionTile(tile, 64, 4, 2)
    # Up to 32 KB of keys and as much of values: at a head size of 64 all 227 keys of a denoise step in one block.
    block = min(max(16, triton.next_power_of_2(keys)), 16_384 // block_dim)
    return AttentionTile(tile, block, 4 if tile == 16 else 8, 1 if block >= keys else 2)


def attention_tile(tokens: int, block_dim: int, narrow: bool) -> AttentionTile:
    rows = max(16, min(triton.next_power_of_2(tokens), 128))
    if not narrow:
        return AttentionTile(min(rows, 32 if block_dim <= 64 else 16), 32, 8, 1)
    return AttentionTile(rows, 64, 8 if rows == 128 else 4, 3 if block_dim <= 64 else 2)


def suffix_embed_tile(rows: int, width: int, cc: int) -> ProductTile:
    """Short tiles: 50 tokens and 720 columns make 92 programs."""
    return ProductTile(16, 32, 64 if cc >= 80 else 32, 4, 2)


def euler_step_tile(width: int, actions: int) -> PlainTile:
    """rows: actions of a program; cols: how much of the row it takes at a time."""
    return PlainTile(min(8, triton.next_power_of_2(actions)), min(256, triton.next_power_of_2(width)), 4)


def image_tile(width: int) -> PlainTile:
    """One warp stores 32 neighbouring pixels of a row."""
    return PlainTile(8, min(64, triton.next_power_of_2(width)), 4)


class Target(NamedTuple):
    """What tiles are chosen by. multiprocessors: of the generation's largest part, or its only one; shared_bytes: that one
    block may have; multiplies: 16-bit multiply-adds a clock of one multiprocessor's tensor cores; warpgroups: these read
    operands from shared memory, not from registers, so a stage stays there until its products are done."""

    multiprocessors: int
    shared_bytes: int
    multiplies: int
    warpgroups: bool = False


FMA_UNITS = 128
TARGETS = {
    75: Target(72, 64 << 10, FMA_UNITS),  # Triton has no code for its tensor cores
    80: Target(108, 163 << 10, 1024),
    86: Target(84, 99 << 10, 512),
    87: Target(16, 163 << 10, 1024),
    89: Target(142, 99 << 10, 512),
    90: Target(132, 227 << 10, 2048, True),
    100: Target(148, 227 << 10, 4096, True),
    103: Target(148, 227 << 10, 4096, True),
    120: Target(170, 99 << 10, 512),
}


def target(cc: int) -> Target:
    """The row of this compute capability, or of the nearest below it."""
    return TARGETS[max((known for known in TARGETS if known <= cc), default=min(TARGETS))]


class GemmTile(NamedTuple):
    """A program's tile of the output, its step along K, how many programs share a tile's K, and the launch."""

    rows: int
    cols: int
    depth: int
    split: int
    group: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        """As keyword arguments of a kernel."""
        sizes = {"BLOCK_M": self.rows, "BLOCK_N": self.cols, "BLOCK_K": self.depth}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


# Bytes a clock that one multiprocessor can take from L2, its share of L2 when all of them do, and its share of memory;
# clocks from a load to its data, of a step along K beside its loads, of a program's beginning and end, and of the wait
# for the other programs of a split.
# About an H100's; they rank tiles, as absolute times they would be wrong.
PORT_BYTES, L2_BYTES, MEMORY_BYTES = 48, 28, 13
LATENCY_CLOCKS, STEP_CLOCKS, PROGRAM_CLOCKS, SPLIT_CLOCKS = 1200, 100, 700, 1000
MAX_SPLIT = 16


@cache
def gemm_tile(
    rows: int,
    inputs: int,
    outputs: int,
    cc: int,
    x_bytes: int = 2,
    weight_bytes: int = 2,
    *,
    products: int = 1,
    segments: int = 1,
    split: bool = False,
    residual: bool = False,
) -> GemmTile:
    """The tile that should take the fewest clocks: reasoned, not measured.

    products  matrices that a program multiplies its rows by (gate and up, the two halves of a head)
    segments  parts of ``outputs`` columns that tiles do not cross (heads)
    split     whether the kernel can share K between programs
    residual  whether a second matrix is read at the end, which takes registers beside the sums

    The time is the longest of four: a multiprocessor's own reads, the reads of all from L2, the weights from memory at
    the rate that the loads in flight allow, the multiplications. Many rows (vision) thus get the tile with the fewest
    reads that fills the machine, 128 x 128 or 128 x 256 on an H100; the 50 rows of an action chunk get small tiles, many
    programs and a split K, for there it is bytes in flight that count.
    """
    device = target(cc)
    speed = device.multiplies if weight_bytes <= 2 else FMA_UNITS
    tensor_cores = speed > FMA_UNITS
    best = None
    for block_rows in (16, 32, 64, 128):
        for block_cols in (16, 32, 64, 128, 256):
            if block_rows >= max(2 * rows, 32) or block_cols >= max(2 * outputs, 32):
                continue  # half of it would be padding
            # 128 x 256 fp32 sums are half the registers of 8 warps: only without operands and a residual beside them.
            # An 8-bit weight makes x pass through registers in fp32 on its way to 8 bits.
            most = 128 * 256 if device.warpgroups and not residual and weight_bytes > 1 else 128 * 128
            if not tensor_cores:  # operands are in registers too, widened
                most = 64 * 16 * weight_bytes // products
            if block_rows * block_cols * products > most:
                continue
            depth, stages = _depth_and_stages(
                block_rows, block_cols * products, x_bytes, weight_bytes, device
            )
            if not stages:
                continue
            row_tiles, col_tiles = -(-rows // block_rows), segments * -(-outputs // block_cols)
            tiles = row_tiles * col_tiles
            steps = max(-(-inputs // depth), 1)
            for parts in range(1, min(MAX_SPLIT, steps) + 1 if split else 2):
                k = -(-steps // parts) * depth
                read = k * (block_rows * x_bytes + block_cols * products * weight_bytes)
                waves = -(-tiles * parts // device.multiprocessors)
                multiply = waves * k * max(block_rows, 64) * block_cols * products / speed
                together = tiles * parts * read / (L2_BYTES * device.multiprocessors)
                flying: float = (stages - 1) * depth * block_cols * products * weight_bytes
                flying *= min(tiles * parts, device.multiprocessors) / row_tiles
                rate = min(MEMORY_BYTES * device.multiprocessors, flying / LATENCY_CLOCKS)
                memory = inputs * segments * outputs * products * weight_bytes / rate
                alone = waves * (read / PORT_BYTES + k / depth * STEP_CLOCKS)
                clocks = max(alone, together, memory, multiply) + waves * PROGRAM_CLOCKS
                if parts > 1:
                    sums = tiles * (2 * parts) * block_rows * block_cols * 4
                    clocks += SPLIT_CLOCKS + sums / (L2_BYTES * device.multiprocessors)
                if best is None or clocks < best[0]:
                    warps = 8 if block_rows * block_cols * products > 64 * 128 else 4
                    best = (clocks, GemmTile(block_rows, block_cols, depth, parts, 8, warps, stages))
    assert best is not None, f"no tile fits {device}"
    return best[1]


def _depth_and_stages(
    rows: int, cols: int, x_bytes: int, weight_bytes: int, device: Target
) -> tuple[int, int]:
    """(BLOCK_K, num_stages) whose loads in flight fit into shared memory; (_, 0) where two buffers do not."""
    asynchronous = device.shared_bytes > 64 << 10
    for depth in (128, 64, 32) if weight_bytes <= 2 and device.multiplies > FMA_UNITS else (32, 16):
        stage = depth * (rows * x_bytes + cols * weight_bytes)
        if weight_bytes == 1 and rows * depth > 128 * 64:
            continue  # x in fp32 in registers, see above
        if depth == 128 and stage > 24 << 10:
            continue  # deep steps are for small tiles, whose loads would be too few
        for stages in (4, 3, 2) if asynchronous else (2,):
            needed = _shared_bytes(rows, cols, depth, stages, x_bytes, weight_bytes, device)
            if (stages >= 3 or device.warpgroups or not asynchronous) and needed <= device.shared_bytes:
                return depth, stages
    return 0, 0


def _shared_bytes(
    rows: int, cols: int, depth: int, stages: int, x_bytes: int, weight_bytes: int, device: Target
) -> int:
    buffers = stages if device.warpgroups else stages - 1
    loads = buffers * depth * (rows * x_bytes + cols * weight_bytes)
    # x passes through shared memory once more where it is converted or normalised, the sums do on their way out; a norm's
    # weight and the barriers take less than 4 KiB.
    return max(loads + rows * depth * weight_bytes, rows * cols * 4) + (4 << 10)


def shared_bytes(tile: GemmTile, cc: int, x_bytes: int = 2, weight_bytes: int = 2, products: int = 1) -> int:
    """The most shared memory that a program of this tile needs."""
    cols = tile.cols * products
    return _shared_bytes(tile.rows, cols, tile.depth, tile.stages, x_bytes, weight_bytes, target(cc))
