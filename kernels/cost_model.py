"""Tiles of matrix products, ranked by the clocks that they should take on a target, and the shared memory that they need."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from .tiles import CANDIDATES, MAX_SPLIT, GemmTile


class Target(NamedTuple):
    """What tiles are chosen by. multiprocessors: of the generation's largest part, or its only one; shared_bytes: that one
    block may have; multiplies: 16-bit multiply-adds a clock of one multiprocessor's tensor cores; warpgroups: these read
    operands from shared memory, not from registers, so a stage stays there until its products are done. port_bytes: a clock,
    that one multiprocessor can take from L2; l2_bytes: its share when all of them do. issue: clocks of an instruction of a
    warp that has a scheduler to itself or nearly so; 0 where it was not measured."""

    multiprocessors: int
    shared_bytes: int
    multiplies: int
    warpgroups: bool = False
    port_bytes: int = 48
    l2_bytes: int = 28
    issue: int = 0


FMA_UNITS = 128
TARGETS = {
    75: Target(72, 64 << 10, FMA_UNITS),  # Triton has no code for its tensor cores
    80: Target(108, 163 << 10, 1024),
    86: Target(84, 99 << 10, 512),
    87: Target(16, 163 << 10, 1024),
    89: Target(142, 99 << 10, 512),
    90: Target(132, 227 << 10, 2048, True, 64, 24, 9),
    100: Target(148, 227 << 10, 4096, True),
    103: Target(148, 227 << 10, 4096, True),
    120: Target(170, 99 << 10, 512),
}


def target(cc: int) -> Target:
    """The row of this compute capability, or of the nearest below it."""
    return TARGETS[max((known for known in TARGETS if known <= cc), default=min(TARGETS))]


# Bytes a clock that are a multiprocessor's share of memory; clocks from a load to its data, of a step along K beside its
# loads, of a program's beginning and end, and of the wait for the other programs of a split.
# About an H100's, as in benchmarks/gpu_account/price.py; they rank tiles, as absolute times they would be wrong.
MEMORY_BYTES = 13
LATENCY_CLOCKS, STEP_CLOCKS, PROGRAM_CLOCKS, SPLIT_CLOCKS = 1200, 100, 700, 1000
L2_CLOCKS = 290
"""From a load to its data in L2, which the last program of a split waits for once a part."""
MEASURED_BYTES = 31
"""A clock, of one multiprocessor from L2 when all read: of an H200, in the place of both shares where instructions count."""
COUNTED_ROWS = 256
"""Up to so many rows instructions count. Above, multiprocessors have several blocks, or large ones: there the tiles as they
were took 1.0 to 1.4 times what cuBLAS did (benchmarks/results/contacts)."""
PREFETCHED = 90
"""From this capability on weights are on their way before a program asks for them (``dependent_launch``)."""


@cache
def gemm_tiles(
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
) -> tuple[GemmTile, ...]:
    """The tiles that should take the fewest clocks, best first: reasoned, not measured.

    Of each rows x cols one, with the split of K that suits it; those that differ in less are not worth measuring.

    products  matrices that a program multiplies its rows by (gate and up, the two halves of a head)
    segments  parts of ``outputs`` columns that tiles do not cross (heads)
    split     whether the kernel can share K between programs
    residual  whether a second matrix is read at the end, which takes registers beside the sums

    The time is the longest of four: a multiprocessor's own reads, and where that was measured the instructions of a warp
    one behind the other; the reads of all from L2; the weights from memory at the rate that the loads in flight allow; the
    multiplications. Many rows (vision) thus get the tile with the fewest reads that fills the machine, 128 x 128 or
    128 x 256 on an H100; the 50 rows of an action chunk get small tiles, many programs and a split K, for there it is bytes
    in flight and instructions that count.

    raises    ValueError for a product over no inputs: kernels take their first step along K without asking
    """
    if inputs < 1:
        raise ValueError(f"a product over {inputs} inputs has no tile; accepted is 1 and more")
    device = target(cc)
    speed = device.multiplies if weight_bytes <= 2 else FMA_UNITS
    tensor_cores = speed > FMA_UNITS
    counted = tensor_cores and device.issue > 0 and rows <= COUNTED_ROWS
    if counted:
        device = device._replace(port_bytes=MEASURED_BYTES, l2_bytes=MEASURED_BYTES)
    ranked: list[tuple[float, GemmTile]] = []
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
            steps = -(-inputs // depth)
            best = None
            for parts in range(1, min(MAX_SPLIT, steps) + 1 if split else 2):
                k = -(-steps // parts) * depth
                read = k * (block_rows * x_bytes + block_cols * products * weight_bytes)
                waves = -(-tiles * parts // device.multiprocessors)
                multiply = waves * k * max(block_rows, 64) * block_cols * products / speed
                together = tiles * parts * read / (device.l2_bytes * device.multiprocessors)
                flying: float = (stages - 1) * depth * block_cols * products * weight_bytes
                flying *= min(tiles * parts, device.multiprocessors) / row_tiles
                if cc >= PREFETCHED:
                    flying = math.inf
                rate = min(MEMORY_BYTES * device.multiprocessors, flying / LATENCY_CLOCKS)
                memory = inputs * segments * outputs * products * weight_bytes / rate
                ends, tile_bytes = 0.0, block_rows * block_cols * 4
                if parts > 1:  # the last program of a tile adds the parts up alone
                    spread = tiles * 2 / (device.l2_bytes * device.multiprocessors)
                    ends = SPLIT_CLOCKS + parts * tile_bytes * spread
                    if counted:
                        ends = SPLIT_CLOCKS + parts * (L2_CLOCKS + tile_bytes / device.port_bytes)
                large = block_rows * block_cols * products > 64 * 128
                for warps in (4, 8) if counted and not large else (8 if large else 4,):
                    step, program = float(STEP_CLOCKS), float(PROGRAM_CLOCKS)
                    if counted:
                        shape = (block_rows, block_cols, depth, products)
                        step, program = _instructions(*shape, parts, warps, x_bytes, weight_bytes)
                        alone = waves * max(read / device.port_bytes, k / depth * step * device.issue)
                        program *= device.issue
                    else:
                        alone = waves * (read / device.port_bytes + k / depth * step)
                    clocks = max(alone, together, memory, multiply) + waves * program + ends
                    if best is None or clocks < best[0]:
                        best = (clocks, GemmTile(block_rows, block_cols, depth, parts, 8, warps, stages))
            assert best is not None
            ranked.append(best)
    assert ranked, f"no tile fits {device}"
    ranked.sort(key=lambda each: each[0])
    return tuple(tile for _, tile in ranked[:CANDIDATES])


def _instructions(
    rows: int, cols: int, depth: int, products: int, parts: int, warps: int, x_bytes: int, weight_bytes: int
) -> tuple[float, float]:
    """How many a warp executes in a step along K, and in a program beside its steps. Fitted to what ptxas emits for sm_90:
    so many for each copy of 16 bytes, each product on tensor cores and each sum of a thread."""
    copies = (rows * x_bytes + cols * products * weight_bytes) * depth / (16 * 32 * warps)
    sums = rows * cols * products / (32 * warps)
    step = 45 + 4 * copies
    program = 200 + 12 * copies + sums * (10 + (6 + 1.5 * parts if parts > 1 else 0))
    if rows >= 64 and weight_bytes <= 2:
        step += 3 * products * depth / 16 * max(1.0, rows / (16 * warps))
    else:
        twice = products > 1 and (rows == 32 or rows * cols < 512)  # warps then repeat each other's loads
        step += products * depth / 16 * max(1.0, rows * cols / 512) * (1 + twice)
        program += 150 * twice
    return step, program


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


def buffers(stages: int, device: Target) -> int:
    """How many steps' loads are in shared memory at once."""
    return stages if device.warpgroups else max(stages - 1, 1)


def _shared_bytes(
    rows: int, cols: int, depth: int, stages: int, x_bytes: int, weight_bytes: int, device: Target
) -> int:
    loads = buffers(stages, device) * depth * (rows * x_bytes + cols * weight_bytes)
    # x passes through shared memory once more where it is converted or normalised, the sums do on their way out; a norm's
    # weight and the barriers take less than 4 KiB.
    return max(loads + rows * depth * weight_bytes, rows * cols * 4) + (4 << 10)


SUMS = 128
"""fp32 values that a thread may keep over a loop: half of its 255 registers."""


def too_large(needed: int, sums: int, warps: int, cc: int) -> str | None:
    """Why a tile that needs so many bytes of shared memory and fp32 sums cannot serve, and what is accepted."""
    most = target(cc).shared_bytes
    if needed > most:
        return f"needs {needed} bytes of shared memory; accepted are at most {most} on sm_{cc}"
    if sums > SUMS * 32 * warps:
        return f"keeps {sums} sums in registers; accepted are at most {SUMS * 32 * warps} in {warps} warps"
    return None


def gemm_refusal(
    tile: GemmTile,
    rows: int,
    inputs: int,
    outputs: int,
    cc: int,
    x_bytes: int = 2,
    weight_bytes: int = 2,
    *,
    products: int = 1,
    split: bool = False,
    **_: int,
) -> str | None:
    """Why a chosen tile cannot serve the call that ``gemm_tiles`` has candidates for, None where it can."""
    if tile.split > 1 and not split:
        return "shares K between programs, which this kernel does not; accepted is split1"
    if tile.split > (steps := -(-inputs // tile.depth)):
        return f"leaves programs without a step along K; accepted is at most split{steps}"
    if weight_bytes == 1 and tile.depth < 32:
        return f"takes steps of {tile.depth} along K; accepted are at least 32 beside an 8-bit weight"
    needed = shared_bytes(tile, cc, x_bytes, weight_bytes, products)
    return too_large(needed, tile.rows * tile.cols * products, tile.warps, cc)


def shared_bytes(tile: GemmTile, cc: int, x_bytes: int = 2, weight_bytes: int = 2, products: int = 1) -> int:
    """The most shared memory that a program of this tile needs."""
    cols = tile.cols * products
    return _shared_bytes(tile.rows, cols, tile.depth, tile.stages, x_bytes, weight_bytes, target(cc))
