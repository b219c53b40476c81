"""Layer normalisation, one program a row.

The row stays in registers, so the variance can be taken of the centred values, which does not cancel where the mean is
large, and x is still read once and y written once: the kernel is bound by memory. All in fp32 from the residual stream
straight to the dtype of the product that reads it, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, check
from .dependent_launch import await_inputs, dependent_launch
from .tuning import row_tile


@triton.jit
def _layer_norm_fwd(
    x_ptr, weight_ptr, bias_ptr, y_ptr, width, eps, DEPENDENT: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    row_start = tl.program_id(0).to(tl.int64) * width
    cols = tl.arange(0, BLOCK_COLS)
    mask = cols < width
    await_inputs(DEPENDENT)
    x = tl.load(x_ptr + row_start + cols, mask=mask, other=0.0).to(tl.float32)
    # Rounded rightly: where the mean is large, a unit of it is much beside the spread, and `/` may err by two.
    mean = tl.div_rn(tl.sum(x, axis=0), tl.cast(width, tl.float32))
    centred = tl.where(mask, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    y = centred * scale * weight + bias
    tl.store(y_ptr + row_start + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """``y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias`` over the last dimension (arXiv 1607.06450).

    x        [..., W]  fp32 | bf16 | fp16, contiguous      weight, bias  [W], any of these dtypes
    dtype    of the result, any of these; that of x where None
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
    tile = row_tile(width)
    if x.numel():
        _layer_norm_fwd[(x.numel() // width,)](
            x,
            weight,
            bias,
            y,
            width,
            eps,
            **dependent_launch(capability(x.device)),
            BLOCK_COLS=tile.cols,
            num_warps=tile.num_warps,
        )
    return y
