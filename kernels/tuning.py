"""Tile sizes and warps, by op and size: the only place for such numbers."""

from __future__ import annotations

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
