"""The expert's keys and values for a cross layer: two products of the prefix KV in one launch.

The second axis of the grid picks keys or values; the heads of a token lie side by side, so its row of the cache is a row of
the product. Rows are found through the cache's own strides (there may be free slots behind the prefix) and converted to
the weight's dtype tile by tile: the weights are fp32 in LeRobot's default layout, and then so are the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, check, product
from .dependent_launch import await_inputs, dependent_launch, prefetch_weight
from .tuning import fp32_precision, gemm_tile


@triton.jit
def _cross_kv_fwd(
    k_ptr,
    v_ptr,
    k_weight_ptr,
    v_weight_ptr,
    k_out_ptr,
    v_out_ptr,
    rows,
    tokens,
    width,
    batch_stride,
    token_stride,
    weight_row_stride,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, col < width
    if tl.program_id(1) == 0:
        x_ptr, weight_ptr, y_ptr = k_ptr, k_weight_ptr, k_out_ptr
    else:
        x_ptr, weight_ptr, y_ptr = v_ptr, v_weight_ptr, v_out_ptr
    row64 = row.to(tl.int64)[:, None]
    x_rows = x_ptr + row64 // tokens * batch_stride + row64 % tokens * token_stride
    # Columns beyond the last one have its weights, and are never stored.
    weight_cols = weight_ptr + tl.minimum(col, width - 1).to(tl.int64)[None, :] * weight_row_stride
    prefetch_weight(weight_cols, 0, width, row_tile == 0, DEPENDENT)
    await_inputs(DEPENDENT)
    y = product(
        x_rows, weight_cols, row_mask, col_mask, 0, width, width, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row64 * width + col[None, :], y, mask=row_mask[:, None] & col_mask[None, :])


def cross_kv(
    k: Tensor, v: Tensor, k_weight: Tensor, v_weight: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``k' = k·Wkᵀ,  v' = v·Wvᵀ`` over the joined heads.

    k, v       [B, P, K, D]  both of one dtype, fp32 | bf16 | fp16; views of the cache
    weights    [K·D, K·D]  both of one dtype, any of these
    dtype      of the result, the weights' where not given; sums are rounded to it once
    returns    k', v'  [B, P, K, D]
    errors     ValueError for other shapes or dtypes, a strided last dimension; k and v are copied where their heads do not
               lie side by side or their strides differ, weights where theirs differ
    replaces   ``k_proj`` / ``v_proj`` in ``forward_cross_attn_layer``
    """
    batch, tokens, heads, head_dim = k.shape
    width = heads * head_dim
    check("cross_kv", "k_weight", k_weight, (width, width))
    check("cross_kv", "v_weight", v_weight, (width, width), like=k_weight)
    check("cross_kv", "k", k, (batch, tokens, heads, head_dim), like=k_weight)
    check("cross_kv", "v", v, (batch, tokens, heads, head_dim), like=k_weight)
    if k.dtype is not v.dtype or k_weight.dtype is not v_weight.dtype:
        raise ValueError(
            f"cross_kv: k is {k.dtype}, v {v.dtype}, k_weight {k_weight.dtype}, v_weight {v_weight.dtype}; "
            "accepted is one dtype for k and v and one for their weights"
        )
    outputs = torch.empty((2, *k.shape), dtype=dtype or k_weight.dtype, device=k.device)
    if outputs.numel():
        if k.stride() != v.stride() or k.stride(2) != head_dim:
            k, v = k.contiguous(), v.contiguous()
        if k_weight.stride(0) != v_weight.stride(0):
            k_weight, v_weight = k_weight.contiguous(), v_weight.contiguous()
        rows, cc = batch * tokens, capability(k.device)
        tile = gemm_tile(rows, width, width, cc, k.itemsize, k_weight.itemsize, segments=2)
        _cross_kv_fwd[(triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.cols), 2)](
            k,
            v,
            k_weight,
            v_weight,
            outputs[0],
            outputs[1],
            rows,
            tokens,
            width,
            k.stride(0),
            k.stride(1),
            k_weight.stride(0),
            PRECISION=fp32_precision(cc),
            **dependent_launch(cc),
            **tile.launch,
        )
    return outputs[0], outputs[1]
