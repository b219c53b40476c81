"""Layer normalisation, one program a few rows.

Rows stay in registers, so the variance can be taken of the centred values, which does not cancel where the mean is
large, and x is still read once and y written once: the kernel is bound by memory. All in fp32 from the residual stream
straight to the dtype of the product that reads it, rounded once. Rows of a program share the weight, the bias
and what stands beside the stream.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, check
from .dependent_launch import await_inputs, dependent_launch
from .tuning import norm_tile


@triton.jit
def _layer_norm_fwd(
    x_ptr,
    weight_ptr,
    bias_ptr,
    offset_ptr,
    left_ptr,
    sum_ptr,
    y_ptr,
    rows,
    width,
    eps,
    OFFSETS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    in_cols = cols < width
    mask = (row < rows)[:, None] & in_cols[None, :]
    places = row.to(tl.int64)[:, None] * width + cols[None, :]
    await_inputs(DEPENDENT)
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if OFFSETS > 0:
        offset = tl.load(offset_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
        if OFFSETS > 1:
            offset += tl.load(left_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
            if tl.program_id(0) == 0:
                tl.store(sum_ptr + cols, offset, mask=in_cols)
        x += offset[None, :]
    # Rounded rightly: where the mean is large, a unit of it is much beside the spread, and `/` may err by two.
    mean = tl.div_rn(tl.sum(x, axis=1), tl.cast(width, tl.float32))
    centred = tl.where(mask, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    y = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=mask)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    offset: Any = None,
) -> Tensor:
    """``y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias`` over the last dimension (arXiv 1607.06450).

    x        [..., W]  fp32 | bf16 | fp16, contiguous      weight, bias  [W], any of these dtypes
    dtype    of the result, any of these; that of x where None
    offset   ``ops.stream_offset.StreamOffset`` of x: added to each row; its vectors become one
    returns  [..., W]
    numerics all in fp32, one rounding
    errors   ValueError for other shapes, strides or dtypes, or more than tuning.MAX_ROW columns
    replaces ``layer_norm1`` / ``layer_norm2`` / ``post_layernorm`` of SigLIP
    """
    check("layer_norm", "x", x, tuple(x.shape))
    if not x.ndim or not x.is_contiguous():
        raise ValueError(
            f"layer_norm: x, of shape {list(x.shape)}, must be contiguous; call .contiguous() on it"
        )
    width = x.shape[-1]
    check("layer_norm", "weight", weight, (width,), like=x)
    check("layer_norm", "bias", bias, (width,), like=x)
    y = torch.empty(x.shape, dtype=x.dtype if dtype is None else dtype, device=x.device)
    check("layer_norm", "the result", y, tuple(x.shape))
    terms = [] if offset is None else offset.terms
    for term in terms:
        check("layer_norm", "a vector of the offset", term, (width,), like=x)
    rows, cc = x.numel() // max(width, 1), capability(x.device)
    tile = norm_tile(rows, width, cc)
    if x.numel():
        first, last = (terms[0], terms[-1]) if terms else (x, x)
        total = torch.empty(width, dtype=torch.float32, device=x.device) if len(terms) > 1 else first
        _layer_norm_fwd[(triton.cdiv(rows, tile.rows),)](
            x,
            weight,
            bias,
            first,
            last,
            total,
            y,
            rows,
            width,
            eps,
            OFFSETS=len(terms),
            **dependent_launch(cc),
            BLOCK_ROWS=tile.rows,
            BLOCK_COLS=tile.cols,
            num_warps=tile.num_warps,
        )
        if terms:
            offset.vector, offset.bias = total, None
    return y
