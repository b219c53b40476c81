"""Matrix product with bias, activation and residual, one program a tile of the output.

The sum stays in fp32 registers while bias, activation and residual are applied, and is rounded once, when it is stored.
x is converted to the weight's dtype tile by tile, so a wider residual stream needs no copy of its own. Programs run in
groups of row tiles that share a weight tile in L2. With many rows the tensor cores are the bound, with few the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import as_rows, capability, check, gelu_tanh, parts, product, silu, tile_of
from .dependent_launch import await_inputs, dependent_launch, prefetch_weight
from .tuning import gemm_tile

ACTIVATIONS = (None, "gelu_tanh", "silu")


@triton.jit
def _linear_fwd(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    inputs,
    outputs,
    x_row_stride,
    weight_row_stride,
    residual_row_stride,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_tile, col_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N), GROUP_M)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, col < outputs
    # 64 bits: many images of wide rows pass 2^31 elements
    row64 = row.to(tl.int64)[:, None]
    x_rows = x_ptr + row64 * x_row_stride
    # Columns beyond the last one have its weights, and are never stored.
    weight_cols = weight_ptr + tl.minimum(col, outputs - 1).to(tl.int64)[None, :] * weight_row_stride
    prefetch_weight(weight_cols, 0, inputs, row_tile == 0, DEPENDENT)
    await_inputs(DEPENDENT)
    y = product(x_rows, weight_cols, row_mask, col_mask, 0, inputs, inputs, BLOCK_M, BLOCK_N, BLOCK_K)
    if weight_ptr.dtype.element_ty == tl.float8e4nv:
        y *= tl.load(scale_ptr + col, mask=col_mask, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu_tanh":
        y = gelu_tanh(y)
    elif ACTIVATION == "silu":
        y = silu(y, ROUNDED=y_ptr.dtype.element_ty == tl.float32)
    mask = row_mask[:, None] & col_mask[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row64 * residual_row_stride + col[None, :], mask=mask, other=0.0)
        y += residual.to(tl.float32)
    tl.store(y_ptr + row64 * outputs + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``y = residual + act(x · weightᵀ + bias)``.

    x           [..., I]        weight  [O, I]        bias  [O]        any of fp32 | bf16 | fp16, each its own;
                the weight may be quantised: (e4m3, scales of its rows, dtype of its products); x then is, by row
    activation  None | "gelu_tanh" | "silu"        residual  [..., O]
    returns     [..., O]  dtype of weight; with a residual what weight and residual promote to
    errors      ValueError for another activation, other shapes or dtypes, I = 0, a strided last dimension; leading
                dimensions of x and residual are copied where they have no common stride
    replaces    the linears of SigLIP with what follows them, the connector's projection, ``state_proj``
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; accepted are None, 'gelu_tanh' and 'silu'")
    outputs, inputs = weight.shape
    lead = x.shape[:-1]
    dtype = weight.dtype
    weight, scale = parts("linear", "weight", weight, (outputs, inputs), like=x)
    check("linear", "x", x, (*lead, inputs))
    if bias is not None:
        check("linear", "bias", bias, (outputs,), like=x)
    if residual is not None:
        check("linear", "residual", residual, (*lead, outputs), like=x)
        dtype = torch.promote_types(dtype, residual.dtype)
    y = torch.empty((*lead, outputs), dtype=dtype, device=x.device)
    if y.numel():
        x = as_rows(x)
        added = y if residual is None else as_rows(residual)
        rows, cc = x.shape[0], capability(x.device)
        tile = gemm_tile(
            rows,
            inputs,
            outputs,
            cc,
            x.itemsize,
            weight.itemsize,
            residual=residual is not None,
        )
        _linear_fwd[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.cols),)](
            x,
            weight,
            scale,
            weight if bias is None else bias,
            added,
            y,
            rows,
            inputs,
            outputs,
            x.stride(0),
            weight.stride(0),
            outputs if residual is None else added.stride(0),
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            ACTIVATION=activation,
            GROUP_M=tile.group,
            **dependent_launch(cc),
            **tile.launch,
        )
    return y
