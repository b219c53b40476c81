"""RMSNorm, query, key and value projections, rotation and the write into the cache, one program a piece of one head.

A program computes columns i and i + D/2 of a head as two sums, for these are what rotation mixes; queries, keys and values
are heads of one grid with three weight pointers. The norm is as in ``norm_swiglu``: x is read once, 1/rms applied to the
sums. Rotation is in fp32 with the positions' sin and cos; keys and values are rounded once, straight into their slots.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import as_rows, capability, check, normalise_first, parts
from .dependent_launch import await_inputs, dependent_launch, prefetch_weight
from .next_norm import stream_products
from .tuning import gemm_tile


@triton.jit
def _norm_qkv_rope_fwd(
    x_ptr,
    norm_weight_ptr,
    squares_ptr,
    q_weight_ptr,
    k_weight_ptr,
    v_weight_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    sin_ptr,
    cos_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rows,
    tokens,
    inputs,
    parts,
    q_heads,
    kv_heads,
    eps,
    x_row_stride,
    weight_row_stride,
    rope_batch_stride,
    slot_batch_stride,
    slot_stride,
    HALF: tl.constexpr,
    NORMALISE_FIRST: tl.constexpr,
    PREPARED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    half_tiles: tl.constexpr = (HALF + BLOCK_N - 1) // BLOCK_N
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    piece = tl.program_id(0) // row_tiles
    head, i = piece // half_tiles, piece % half_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    if head < q_heads:
        weight_ptr, scale_ptr, own = q_weight_ptr, q_scale_ptr, head
    elif head < q_heads + kv_heads:
        weight_ptr, scale_ptr, own = k_weight_ptr, k_scale_ptr, head - q_heads
    else:
        weight_ptr, scale_ptr, own = v_weight_ptr, v_scale_ptr, head - q_heads - kv_heads
    row_mask, col_mask = row < rows, i < HALF
    row64 = row.to(tl.int64)[:, None]
    # Columns beyond the last one have its weights, and are never stored.
    column = own * (2 * HALF) + tl.minimum(i, HALF - 1)
    first_cols = weight_ptr + column.to(tl.int64)[None, :] * weight_row_stride
    second_cols = first_cols + tl.cast(HALF, tl.int64) * weight_row_stride
    prefetch_weight(first_cols, 0, inputs, row_tile == 0, DEPENDENT)
    prefetch_weight(second_cols, 0, inputs, row_tile == 0, DEPENDENT)
    await_inputs(DEPENDENT)
    first, second = stream_products(
        x_ptr + row64 * x_row_stride,
        norm_weight_ptr,
        squares_ptr + row,
        parts,
        rows,
        first_cols,
        second_cols,
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
    if weight_ptr.dtype.element_ty == tl.float8e4nv:
        scales = scale_ptr + own * (2 * HALF) + i
        first *= tl.load(scales, mask=col_mask, other=0.0)[None, :]
        second *= tl.load(scales + HALF, mask=col_mask, other=0.0)[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    batch, token = row64 // tokens, row64 % tokens
    within = own * (2 * HALF) + i[None, :]
    slots = batch * slot_batch_stride + token * slot_stride + within
    if head >= q_heads + kv_heads:
        tl.store(v_ptr + slots, first.to(v_ptr.dtype.element_ty), mask=mask)
        tl.store(v_ptr + slots + HALF, second.to(v_ptr.dtype.element_ty), mask=mask)
    else:
        angle = batch * rope_batch_stride + token * HALF + i[None, :]
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        if head < q_heads:
            q_rows = q_ptr + row64 * (q_heads * 2 * HALF) + within
            tl.store(q_rows, turned.to(q_ptr.dtype.element_ty), mask=mask)
            tl.store(q_rows + HALF, second.to(q_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(k_ptr + slots, turned.to(k_ptr.dtype.element_ty), mask=mask)
            tl.store(k_ptr + slots + HALF, second.to(k_ptr.dtype.element_ty), mask=mask)


def norm_qkv_rope(
    x: Tensor,
    norm: tuple[Tensor, float],
    weights: tuple[Any, Any, Any],
    rope: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor] | None,
    *,
    memory: Any = None,
    normed: Any = None,
) -> Tensor | None:
    """``h = rms_norm(x);  q = rope(h·Wqᵀ);  slots ← rope(h·Wkᵀ), h·Wvᵀ``.

    x        [B, T, M]      norm  (weight [M], eps)      any of fp32 | bf16 | fp16
    weights  q [H·D, M] or None; k, v [K·D, M] or None; all of one dtype, any of these; they may be quantised, as in
             ``linear``
    rope     (sin, cos), each [B or 1, T, 1, D/2] fp32, contiguous
    slots    k, v  [B, T, K, D]  views of the cache, written, or None; one dtype and the same strides, heads side by side
    memory   not used      normed  as in ``norm_swiglu``
    returns  q [B, T, H, D] in the dtype of its weight, or None
    numerics the norm in fp32, x·norm weight rounded once to the weights' dtype; rotation of the unrounded sums
    errors   ValueError for other shapes, dtypes or strides, or neither queries nor keys and values; leading dimensions of
             x are copied where they have no common stride
    replaces the first half of ``forward_attn_layer`` / ``forward_cross_attn_layer``
    """
    op = "norm_qkv_rope"
    batch, tokens, inputs = x.shape
    norm_weight, eps = norm
    q_weight, k_weight, v_weight = weights
    head_dim = 2 * rope[0].shape[-1]
    has_kv = not (k_weight is None or v_weight is None or slots is None)
    k_out, v_out = slots if has_kv and slots is not None else (None, None)
    used = [w for w in ((q_weight, k_weight, v_weight) if has_kv else (q_weight,)) if w is not None]
    if not used:
        raise ValueError(f"{op} needs a weight of q, or weights and slots of k and v, or all; got neither")
    dtype = used[0].dtype
    check(op, "x", x, (batch, tokens, inputs))
    check(op, "norm.weight", norm_weight, (inputs,), like=x)
    pairs = [parts(op, "a weight", w, (w.shape[0] // head_dim * head_dim, inputs), like=x) for w in used]
    used, scales = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    weight = used[0]
    for w in used:
        if w.dtype is not weight.dtype:
            raise ValueError(f"{op}: weights are {weight.dtype} and {w.dtype}; accepted is one dtype for all")
    sin, cos = rope
    for table in rope:
        shape = (table.shape[0] if table.shape[0] == 1 else batch, tokens, 1, head_dim // 2)
        check(op, "a table of rope", table, shape, like=x)
        if table.dtype is not torch.float32 or not table.is_contiguous() or table.shape != sin.shape:
            raise ValueError(
                f"{op}: a table of rope is {table.dtype}; accepted are two alike, contiguous, fp32"
            )
    q_heads = 0 if q_weight is None else q_weight.shape[0] // head_dim
    kv_heads = k_weight.shape[0] // head_dim if has_kv and k_weight is not None else 0
    if k_out is not None and v_out is not None:
        if tuple(used[-1].shape) != (kv_heads * head_dim, inputs):
            raise ValueError(
                f"{op}: weights.v has shape {list(used[-1].shape)}; accepted is {[kv_heads * head_dim, inputs]}"
            )
        check(op, "slots.k", k_out, (batch, tokens, kv_heads, head_dim), like=x)
        check(op, "slots.v", v_out, (batch, tokens, kv_heads, head_dim), like=x)
        if k_out.stride() != v_out.stride() or (kv_heads > 1 and k_out.stride(2) != head_dim):
            raise ValueError(
                f"{op}: slots.k has strides {k_out.stride()}, slots.v {v_out.stride()}; accepted are the same for both, "
                f"with {head_dim} between heads"
            )
        if k_out.dtype is not v_out.dtype:
            raise ValueError(
                f"{op}: slots.k is {k_out.dtype}, slots.v {v_out.dtype}; accepted is one dtype for both"
            )
    q = None
    if q_weight is not None:
        q = torch.empty((batch, tokens, q_heads, head_dim), dtype=dtype, device=x.device)
    if x.shape[0] and tokens:
        ready = None if normed is None else normed.prepared(x, norm_weight, weight)
        x, squares = ready or (as_rows(x), norm_weight)
        if any(w.stride(0) != weight.stride(0) for w in used):
            used = [w.contiguous() for w in used]
        rows, half, heads = x.shape[0], head_dim // 2, q_heads + 2 * kv_heads
        cc = capability(x.device)
        tile = gemm_tile(rows, inputs, half, cc, x.itemsize, weight.itemsize, products=2, segments=heads)
        _norm_qkv_rope_fwd[(triton.cdiv(rows, tile.rows) * heads * triton.cdiv(half, tile.cols),)](
            x,
            norm_weight,
            squares,
            used[0],
            used[-2 if has_kv else 0],
            used[-1],
            scales[0],
            scales[-2 if has_kv else 0],
            scales[-1],
            sin,
            cos,
            k_out if q is None else q,
            k_out if has_kv else q,
            v_out if has_kv else q,
            rows,
            tokens,
            inputs,
            squares.shape[0],
            q_heads,
            kv_heads,
            eps,
            x.stride(0),
            used[0].stride(0),
            0 if sin.shape[0] == 1 else sin.stride(0),
            0 if k_out is None else k_out.stride(0),
            0 if k_out is None else k_out.stride(1),
            HALF=half,
            NORMALISE_FIRST=normalise_first(weight.dtype),
            PREPARED=ready is not None,
            BLOCK_PARTS=1 if ready is None else triton.next_power_of_2(squares.shape[0]),
            **dependent_launch(cc),
            **tile.launch,
        )
    return q
