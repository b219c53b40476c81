"""RMSNorm and the gated half of a feed-forward block: gate and up are two sums of one program.

x is read once for both products, and never written back normalised: the norm's weight is applied to each tile as it is
loaded, 1/rms to the fp32 sums at the end, since it is a factor of the whole row (``common.normalise_first`` says when it is
applied before). silu(gate) · up stays in fp32 and is rounded once. With the 50 rows of a chunk the weights are the bound.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import as_rows, capability, check, normalise_first, parts, silu
from .dependent_launch import await_inputs, dependent_launch, prefetch_weight
from .next_norm import stream_products
from .tuning import gemm_tile


@triton.jit
def _norm_swiglu_fwd(
    x_ptr,
    norm_weight_ptr,
    squares_ptr,
    gate_weight_ptr,
    up_weight_ptr,
    gate_scale_ptr,
    up_scale_ptr,
    y_ptr,
    rows,
    inputs,
    parts,
    outputs,
    eps,
    x_row_stride,
    gate_row_stride,
    up_row_stride,
    NORMALISE_FIRST: tl.constexpr,
    PREPARED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, col < outputs
    row64 = row.to(tl.int64)[:, None]
    # Columns beyond the last one have its weights, and are never stored.
    col64 = tl.minimum(col, outputs - 1).to(tl.int64)[None, :]
    gate_cols, up_cols = gate_weight_ptr + col64 * gate_row_stride, up_weight_ptr + col64 * up_row_stride
    prefetch_weight(gate_cols, 0, inputs, row_tile == 0, DEPENDENT)
    prefetch_weight(up_cols, 0, inputs, row_tile == 0, DEPENDENT)
    await_inputs(DEPENDENT)
    gate, up = stream_products(
        x_ptr + row64 * x_row_stride,
        norm_weight_ptr,
        squares_ptr + row,
        parts,
        rows,
        gate_cols,
        up_cols,
        row_mask,
        col_mask,
        inputs,
        eps,
        NORMALISE_FIRST,
        PREPARED,
        BLOCK_PARTS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if gate_weight_ptr.dtype.element_ty == tl.float8e4nv:
        gate *= tl.load(gate_scale_ptr + col, mask=col_mask, other=0.0)[None, :]
        up *= tl.load(up_scale_ptr + col, mask=col_mask, other=0.0)[None, :]
    y = (silu(gate, ROUNDED=y_ptr.dtype.element_ty == tl.float32) * up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row64 * outputs + col[None, :], y, mask=row_mask[:, None] & col_mask[None, :])


def norm_swiglu(
    x: Tensor,
    norm: tuple[Tensor, float],
    gate_weight: Any,
    up_weight: Any,
    *,
    memory: Any = None,
    normed: Any = None,
) -> Tensor:
    """``h = rms_norm(x);  y = silu(h·Wgᵀ) · (h·Wuᵀ)``.

    x        [..., M]      norm  (weight [M], eps)      any of fp32 | bf16 | fp16
    weights  gate_weight, up_weight  [F, M], both of one dtype, any of these; they may be quantised, as in ``linear``
    memory   not used
    normed   ``ops.next_norm.NextNorm`` of x and this norm: read in the place of both where it was filled in
    returns  [..., F]  dtype of the weights
    numerics the norm in fp32, x·norm weight rounded once to the weights' dtype
    errors   ValueError for other shapes or dtypes, a strided last dimension; leading dimensions of x are copied where they
             have no common stride
    replaces ``post_attention_layernorm`` and ``mlp`` up to its ``down_proj``
    """
    norm_weight, eps = norm
    outputs, inputs = gate_weight.shape
    lead = x.shape[:-1]
    dtype = gate_weight.dtype
    gate_weight, gate_scale = parts("norm_swiglu", "gate_weight", gate_weight, (outputs, inputs), like=x)
    up_weight, up_scale = parts("norm_swiglu", "up_weight", up_weight, (outputs, inputs), like=x)
    check("norm_swiglu", "norm.weight", norm_weight, (inputs,), like=x)
    check("norm_swiglu", "x", x, (*lead, inputs))
    if up_weight.dtype is not gate_weight.dtype:
        raise ValueError(
            f"norm_swiglu: up_weight is {up_weight.dtype}, gate_weight {gate_weight.dtype}; accepted is one dtype for both"
        )
    y = torch.empty((*lead, outputs), dtype=dtype, device=x.device)
    if y.numel():
        ready = None if normed is None else normed.prepared(x, norm_weight, gate_weight)
        x, squares = ready or (as_rows(x), norm_weight)
        rows, cc = x.shape[0], capability(x.device)
        tile = gemm_tile(rows, inputs, outputs, cc, x.itemsize, gate_weight.itemsize, products=2)
        _norm_swiglu_fwd[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.cols),)](
            x,
            norm_weight,
            squares,
            gate_weight,
            up_weight,
            gate_scale,
            up_scale,
            y,
            rows,
            inputs,
            squares.shape[0],
            outputs,
            eps,
            x.stride(0),
            gate_weight.stride(0),
            up_weight.stride(0),
            NORMALISE_FIRST=normalise_first(gate_weight.dtype),
            PREPARED=ready is not None,
            BLOCK_PARTS=1 if ready is None else triton.next_power_of_2(squares.shape[0]),
            **dependent_launch(cc),
            **tile.launch,
        )
    return y
