"""Residual add and RMSNorm, one program a row.

The row stays in registers between the sum of squares and the product, so x and residual are read once and
y and r written once: the kernel is bound by memory. Sums are fp32 and y is made from the unrounded sum; each
output is rounded once, when it is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import row_tile


@triton.jit
def _add_rms_norm_fwd(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    r_ptr,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    # 64 bits: a long batch of wide rows passes 2^31 elements
    row_start = tl.program_id(0).to(tl.int64) * width
    cols = tl.arange(0, BLOCK_COLS)
    mask = cols < width
    r = tl.load(x_ptr + row_start + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r += tl.load(residual_ptr + row_start + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(r_ptr + row_start + cols, r.to(r_ptr.dtype.element_ty), mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(r * r, axis=0) / width + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row_start + cols, (r * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = x + residual;  y = weight · r / sqrt(mean(r²) + eps)``.

    x, residual  [..., M]  fp32 | bf16 | fp16, contiguous; without a residual r is x itself
    weight       [M], any of these dtypes
    out          (y, r) to write into; allocated where it is None; r is unused without a residual
    returns      y, r  [..., M], dtype of x
    errors       ValueError for other shapes, strides, or more than tuning.MAX_ROW columns
    replaces     the residual add and ``input_layernorm`` / ``post_attention_layernorm`` of a layer
    """
    width = x.shape[-1]
    block_cols, num_warps = row_tile(width)
    y = torch.empty_like(x) if out is None else out[0]
    r = x if residual is None else torch.empty_like(x) if out is None else out[1]
    for name, tensor in (("x", x), ("residual", residual), ("out[0]", y), ("out[1]", r)):
        if tensor is not None and (tensor.shape != x.shape or not tensor.is_contiguous()):
            raise ValueError(f"add_rms_norm: {name} must be contiguous, of shape {list(x.shape)} as x is")
    if weight.shape != (width,) or not weight.is_contiguous():
        raise ValueError(
            f"add_rms_norm: weight has shape {list(weight.shape)}; accepted is [{width}], contiguous"
        )
    if x.numel():
        _add_rms_norm_fwd[(x.numel() // width,)](
            x,
            x if residual is None else residual,
            weight,
            y,
            r,
            width,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK_COLS=block_cols,
            num_warps=num_warps,
        )
    return y, r
