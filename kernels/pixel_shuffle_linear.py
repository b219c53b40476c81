"""The connector: a product whose rows are blocks of patches, gathered while they are loaded.

No shuffled copy of x exists: a row of the product is ``factor`` runs of ``factor · W`` neighbouring numbers, one from each
row of patches, and k picks the run. The rows are few (64 an image) and K is long (12 288), so programs share K as in
``linear_residual``: fp32 partial sums, added up in the order of K by the program that arrives last, rounded once.
"""

from __future__ import annotations

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, check, parts, split_of, split_workspace, sum_of_splits
from .dependent_launch import await_inputs, dependent_launch
from .eight_bits import scale_of, to_e4m3
from .tuning import gemm_tile


@triton.jit
def _pixel_shuffle_linear_fwd(
    x_ptr,
    weight_ptr,
    scale_ptr,
    y_ptr,
    partials_ptr,
    arrivals_ptr,
    rows,
    inputs,
    outputs,
    weight_row_stride,
    FACTOR: tl.constexpr,
    SMALL: tl.constexpr,
    RUN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row_tile = tile % row_tiles
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, col < outputs
    # A row of patches is SMALL runs, a row of blocks FACTOR of these: the first run of block (row // SMALL, row % SMALL).
    row64 = row.to(tl.int64)[:, None]
    x_rows = x_ptr + (row64 // SMALL * (FACTOR * SMALL) + row64 % SMALL) * RUN
    # Columns beyond the last one have its weights, and are never stored.
    weight_cols = weight_ptr + tl.minimum(col, outputs - 1).to(tl.int64)[None, :] * weight_row_stride
    start, stop = split_of(split, inputs, SPLIT_K, BLOCK_K)
    await_inputs(DEPENDENT)
    EIGHT_BITS: tl.constexpr = weight_ptr.dtype.element_ty == tl.float8e4nv
    if EIGHT_BITS:
        # A block is FACTOR runs; over all of K, whatever this program's part of it.
        largest = tl.zeros((BLOCK_M,), tl.float32)
        nan_or_inf = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(0, inputs, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            within = k // RUN * (SMALL * RUN) + k % RUN
            x = tl.load(x_rows + within[None, :], mask=row_mask[:, None] & (k < inputs)[None, :], other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), axis=1))
            nan_or_inf += tl.sum(x.to(tl.float32) * 0.0, axis=1)
        scale = scale_of(largest, nan_or_inf)
        inverse = 1.0 / scale
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(start < stop)  # as in ``product``; beside 8 bits it saves a spill
    for first in range(start, stop, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_mask = k < stop
        within = k // RUN * (SMALL * RUN) + k % RUN
        x = tl.load(x_rows + within[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        w = tl.load(weight_cols + k[:, None], mask=k_mask[:, None] & col_mask[None, :], other=0.0)
        if EIGHT_BITS:
            y = tl.dot(to_e4m3(x.to(tl.float32) * inverse[:, None]), w, y, max_num_imprecise_acc=0)
        else:
            y = tl.dot(x.to(w.dtype), w, y, input_precision="ieee")
    if EIGHT_BITS:
        y *= scale[:, None] * tl.load(scale_ptr + col, mask=col_mask, other=0.0)[None, :]
    y, last = sum_of_splits(y, partials_ptr, arrivals_ptr, tile, split, SPLIT_K, BLOCK_M, BLOCK_N)
    if last:
        mask = row_mask[:, None] & col_mask[None, :]
        tl.store(y_ptr + row64 * outputs + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def pixel_shuffle_linear(x: Tensor, weight: Tensor, factor: int) -> Tensor:
    """Gather each ``factor × factor`` block of patches into one row, then ``rows · weightᵀ``.

    x        [N, side², W]        weight  [M, W·factor²]        any of fp32 | bf16 | fp16, each its own; the
             weight may be quantised, as in ``linear``
    returns  [N, (side/factor)², M]  dtype of weight
    errors   ValueError where the patches are no square of whole blocks, for other shapes or dtypes, a strided last
             dimension; an x that is not contiguous is copied
    replaces ``SmolVLMConnector`` (pixel shuffle of Idefics3, then ``modality_projection``)
    """
    images, tokens, width = x.shape
    side = isqrt(tokens)
    if factor < 1 or side * side != tokens or side % factor:
        raise ValueError(
            f"pixel_shuffle_linear: {tokens} patches an image; accepted are squares of multiples of factor = {factor}"
        )
    small, outputs, inputs = side // factor, weight.shape[0], width * factor * factor
    dtype = weight.dtype
    weight, scale = parts("pixel_shuffle_linear", "weight", weight, (outputs, inputs), like=x)
    check("pixel_shuffle_linear", "x", x, (images, tokens, width))
    y = torch.empty((images, small * small, outputs), dtype=dtype, device=x.device)
    if y.numel():
        x = x.contiguous()
        rows, cc = images * small * small, capability(x.device)
        tile = gemm_tile(rows, inputs, outputs, cc, x.itemsize, weight.itemsize, split=True)
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.cols)
        partials = arrivals = y
        if tile.split > 1:
            partials, arrivals = split_workspace(tiles, tile.split, tile.rows * tile.cols, x.device)
        _pixel_shuffle_linear_fwd[(tiles, tile.split)](
            x,
            weight,
            scale,
            y,
            partials,
            arrivals,
            rows,
            inputs,
            outputs,
            weight.stride(0),
            FACTOR=factor,
            SMALL=small,
            RUN=factor * width,
            SPLIT_K=tile.split,
            **dependent_launch(cc),
            **tile.launch,
        )
    return y
