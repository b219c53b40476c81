"""The end of a residual write: x·norm weight in bf16 and sums of x², so that the next products need not read the stream.

h = x·norm weight in the products' 16 bits, and the sums of x² over the columns of each tile. 1/rms is a factor of a whole
row, so it waits for the products. Every program of these reads all rows: h is half the bytes of the stream in fp32, and goes
from memory to the tensor cores as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import inverse_rms, norm_products


@triton.jit
def store_for_next_norm(y, row, col, mask, col_tile, rows, outputs, weight_ptr, h_ptr, squares_ptr):
    """y  a tile of the stream [rows, cols] as it was stored, in fp32; row, col its places, row in 64 bits."""
    y = tl.where(mask, y, 0.0)
    weight = tl.load(weight_ptr + col, mask=col < outputs, other=0.0).to(tl.float32)
    h = (y * weight[None, :]).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row[:, None] * outputs + col[None, :], h, mask=mask)
    tl.store(squares_ptr + tl.cast(col_tile, tl.int64) * rows + row, tl.sum(y * y, axis=1), mask=row < rows)


@triton.jit
def normed_products(
    h_rows,
    squares_rows,
    parts,
    rows,
    a_cols,
    b_cols,
    row_mask,
    col_mask,
    inputs,
    eps,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``norm_products`` of prepared rows. Pointers: h_rows, a_cols, b_cols to k = 0, squares_rows [BLOCK_M] to part 0."""
    part = tl.arange(0, BLOCK_PARTS)[None, :]  # one wait for all
    squares = tl.load(squares_rows[:, None] + part * rows, mask=row_mask[:, None] & (part < parts), other=0.0)
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(inputs > 0)  # as in ``product``
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        h = tl.load(h_rows + k[None, :], mask=row_mask[:, None] & (k < inputs)[None, :], other=0.0)
        w_mask = (k < inputs)[:, None] & col_mask[None, :]
        a = tl.dot(h, tl.load(a_cols + k[:, None], mask=w_mask, other=0.0), a)
        b = tl.dot(h, tl.load(b_cols + k[:, None], mask=w_mask, other=0.0), b)
    scale = inverse_rms(tl.sum(squares, axis=1), inputs, eps)[:, None]
    return a * scale, b * scale


@triton.jit
def stream_products(
    x_rows,
    norm_weight_ptr,
    squares_rows,
    parts,
    rows,
    a_cols,
    b_cols,
    row_mask,
    col_mask,
    inputs,
    eps,
    NORMALISE_FIRST: tl.constexpr,
    PREPARED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``normed_products`` where x_rows are prepared rows, else ``norm_products`` of the stream."""
    if PREPARED:
        a, b = normed_products(
            x_rows,
            squares_rows,
            parts,
            rows,
            a_cols,
            b_cols,
            row_mask,
            col_mask,
            inputs,
            eps,
            BLOCK_PARTS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    else:
        a, b = norm_products(
            x_rows, norm_weight_ptr, a_cols, b_cols, row_mask, col_mask, inputs, eps, NORMALISE_FIRST, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
    return a, b


def allocate_for_next_norm(
    hint: Any, y: Tensor, cols: int
) -> tuple[dict[str, bool], tuple[Tensor, Tensor, Tensor]]:
    """Allocate ``rows`` and ``squares`` of the hint, a ``NextNorm``, for a stream y [..., M] that is written in tiles of so
    many columns. Returns keyword arguments of the launch and the three pointers; y fills these where there is no hint."""
    if hint is None:
        return {"HAS_NEXT": False}, (y, y, y)
    width = y.shape[-1]
    hint.rows = torch.empty(y.shape, dtype=hint.dtype, device=y.device)
    hint.squares = torch.empty(
        triton.cdiv(width, cols), y.numel() // width, dtype=torch.float32, device=y.device
    )
    # Not contracted: a square that lanes exchange and add up would be fused with the sum on one side of each exchange, and
    # the copies of the sum would differ (``masked_attention_backward``).
    return {"HAS_NEXT": True, "enable_fp_fusion": False}, (hint.weight, hint.rows, hint.squares)
