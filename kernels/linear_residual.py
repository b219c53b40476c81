"""Output projection and residual add: few rows, a long K, so that K is what there is to share out.

A tile of the output has ``SPLIT_K`` programs, each with its part of K; otherwise half of the multiprocessors would have
no work and the others too few bytes in flight. Partial sums meet in fp32 in L2, and the program that arrives last adds
them up in the order of K, so bits never depend on arrival. It adds the residual to the fp32 sum and rounds once.
What bounds it is the weight, read once from memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import as_rows, capability, check, parts, product, split_of, split_workspace, sum_of_splits
from .dependent_launch import await_inputs, dependent_launch, prefetch_weight
from .next_norm import allocate_for_next_norm, store_for_next_norm
from .tuning import gemm_tile


@triton.jit
def _linear_residual_fwd(
    x_ptr,
    weight_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    next_weight_ptr,
    next_rows_ptr,
    next_squares_ptr,
    partials_ptr,
    arrivals_ptr,
    rows,
    inputs,
    outputs,
    x_row_stride,
    weight_row_stride,
    residual_row_stride,
    SPLIT_K: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    # Row tiles of one weight tile are neighbours: it comes from memory once and then from L2.
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row_tile = tile % row_tiles
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, col < outputs
    row64 = row.to(tl.int64)[:, None]
    x_rows = x_ptr + row64 * x_row_stride
    # Columns beyond the last one have its weights, and are never stored.
    weight_cols = weight_ptr + tl.minimum(col, outputs - 1).to(tl.int64)[None, :] * weight_row_stride
    start, stop = split_of(split, inputs, SPLIT_K, BLOCK_K)
    prefetch_weight(weight_cols, start, stop, row_tile == 0, DEPENDENT)
    await_inputs(DEPENDENT)
    y = product(x_rows, weight_cols, row_mask, col_mask, start, stop, inputs, BLOCK_M, BLOCK_N, BLOCK_K)
    if weight_ptr.dtype.element_ty == tl.float8e4nv:
        y *= tl.load(scale_ptr + col, mask=col_mask, other=0.0)[None, :]
    y, last = sum_of_splits(y, partials_ptr, arrivals_ptr, tile, split, SPLIT_K, BLOCK_M, BLOCK_N)
    if last:
        mask = row_mask[:, None] & col_mask[None, :]
        residual = tl.load(residual_ptr + row64 * residual_row_stride + col[None, :], mask=mask, other=0.0)
        sums = (y + residual.to(tl.float32)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row64 * outputs + col[None, :], sums, mask=mask)
        if HAS_NEXT:
            store_for_next_norm(
                sums.to(tl.float32),
                row.to(tl.int64),
                col,
                mask,
                tile // row_tiles,
                rows,
                outputs,
                next_weight_ptr,
                next_rows_ptr,
                next_squares_ptr,
            )


def linear_residual(
    x: Tensor,
    weight: Any,
    residual: Tensor,
    *,
    out: Tensor | None = None,
    memory: Any = None,
    next_norm: Any = None,
) -> Tensor:
    """``y = residual + x · weightᵀ``.

    x        [..., I]      weight  [O, I]      residual  [..., O]      any of fp32 | bf16 | fp16, each its own;
             the weight may be quantised, as in ``linear``
    out, memory  not used
    next_norm  ``ops.next_norm.NextNorm``, filled in for the norm that reads y
    returns  [..., O]  what weight and residual promote to: the dtype of an fp32 residual stream
    errors   ValueError for other shapes or dtypes, a strided last dimension, I = 0; leading dimensions of x and
             residual are copied where they have no common stride
    replaces ``o_proj`` / ``down_proj`` and the in-place add behind them
    """
    outputs, inputs = weight.shape
    lead = x.shape[:-1]
    dtype = torch.promote_types(weight.dtype, residual.dtype)
    weight, scale = parts("linear_residual", "weight", weight, (outputs, inputs), like=x)
    check("linear_residual", "x", x, (*lead, inputs))
    check("linear_residual", "residual", residual, (*lead, outputs), like=x)
    y = torch.empty((*lead, outputs), dtype=dtype, device=x.device)
    if y.numel():
        x, residual = as_rows(x), as_rows(residual)
        rows, cc = x.shape[0], capability(x.device)
        tile = gemm_tile(rows, inputs, outputs, cc, x.itemsize, weight.itemsize, split=True, residual=True)
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.cols)
        partials = arrivals = y
        if tile.split > 1:
            partials, arrivals = split_workspace(tiles, tile.split, tile.rows * tile.cols, x.device)
        flags, next_pointers = allocate_for_next_norm(next_norm, y, tile.cols)
        _linear_residual_fwd[(tiles, tile.split)](
            x,
            weight,
            scale,
            residual,
            y,
            *next_pointers,
            partials,
            arrivals,
            rows,
            inputs,
            outputs,
            x.stride(0),
            weight.stride(0),
            residual.stride(0),
            SPLIT_K=tile.split,
            **flags,
            **dependent_launch(cc),
            **tile.launch,
        )
    return y
