"""Rows as 8-bit floats inside a kernel: e4m3, 4 bits of exponent and 3 of mantissa, with a scale a row (arXiv 2209.05433).

A program reads its rows twice, once for their largest value and once for the product; they are in L2. Nothing is written
back quantised, so a product with an 8-bit weight stays one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x):
    """Nearest e4m3, ties to even, of |x| <= 448 in fp32.

    Adding and taking away 1.5 · 2^20 times the power of two below x leaves it three bits of mantissa, so the conversion
    has nothing left to round: Triton's interpreter would cut off where a GPU rounds.
    """
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
    coarse = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return ((tl.minimum(tl.maximum(x, -448.0), 448.0) + coarse) - coarse).to(tl.float8e4nv)


@triton.jit
def scale_of(largest, nan_or_inf):
    """What a row is divided by: its largest becomes 448. ``nan_or_inf``: NaN where the row has either, which maxima drop."""
    return tl.where(largest > 0.0, largest / 448.0, 1.0) + nan_or_inf


@triton.jit
def row_scale(x_rows, row_mask, inputs, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_M] scales of the rows that start at x_rows [BLOCK_M, 1]."""
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    nan_or_inf = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & (k < inputs)[None, :], other=0.0)
        x = x.to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        nan_or_inf += x * 0.0
    return scale_of(tl.max(largest, axis=1), tl.sum(nan_or_inf, axis=1))
