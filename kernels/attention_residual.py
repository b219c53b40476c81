"""Masked attention, its output projection and the residual add: one launch where a step has few rows.

A program computes attention for a tile of tokens and the query heads of one KV head, rounds it as ``masked_attention`` does,
and multiplies it by these heads' slice of the output weight for its columns. KV heads split the inner dimension; their
partial sums are added as in ``linear_residual``. The last head's part has the residual, which is read together with a weight
and not behind the sum. Each tile of columns computes attention anew: cheaper than a second launch and a round trip through
memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tuning import COLS_AT_ONCE, attention_residual_tile
from .common import arrives_last, as_rows, capability, check, split_workspace, store_part, sum_of_parts
from .dependent_launch import await_inputs, dependent_launch, prefetch_weight
from .masked_attention import TYPES, attend, check_attention
from .next_norm import allocate_for_next_norm, store_for_next_norm
from .tuning import fp32_precision, head_block


@triton.jit
def weight_columns(step, outputs, weight_ptr, weight_row_stride, BLOCK_COLS: tl.constexpr):
    """Pointers [1, BLOCK_COLS] to k = 0 of a step's columns. Those past the last repeat it and are masked at the store."""
    col = tl.minimum(step * BLOCK_COLS + tl.arange(0, BLOCK_COLS), outputs - 1)
    return weight_ptr + col.to(tl.int64)[None, :] * weight_row_stride


@triton.jit
def store_sums(
    y,
    own,
    step,
    batch,
    tokens,
    all_rows,
    outputs,
    y_ptr,
    next_weight_ptr,
    next_rows_ptr,
    next_squares_ptr,
    HAS_NEXT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Store the whole sums y of a step of columns. own: the tile's tokens."""
    col = step * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (own < tokens)[:, None] & (col < outputs)[None, :]
    row = (batch * tokens + own)[:, None]
    sums = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * outputs + col[None, :], sums, mask=mask)
    if HAS_NEXT:
        # Behind the last token of a sample stand the next sample's rows.
        here = tl.where(own < tokens, batch * tokens + own, all_rows)
        # Nor has a step beyond the last column a place among the squares.
        here = tl.where(step * BLOCK_COLS < outputs, here, all_rows)
        store_for_next_norm(
            sums.to(tl.float32),
            here,
            col,
            mask,
            step,
            all_rows,
            outputs,
            next_weight_ptr,
            next_rows_ptr,
            next_squares_ptr,
        )


@triton.jit
def _attention_residual_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    next_weight_ptr,
    next_rows_ptr,
    next_squares_ptr,
    partials_ptr,
    arrivals_ptr,
    tokens,
    all_rows,
    keys,
    outputs,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_key_stride,
    k_head_stride,
    v_batch_stride,
    v_key_stride,
    v_head_stride,
    mask_batch_stride,
    mask_token_stride,
    mask_key_stride,
    weight_row_stride,
    residual_row_stride,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    COL_STEPS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    col_tiles = tl.cdiv(outputs, BLOCK_COLS * COL_STEPS)
    token_tile = tile % token_tiles
    first_step = tile // token_tiles % col_tiles * COL_STEPS
    batch = (tile // token_tiles // col_tiles).to(tl.int64)
    # The inner dimension, padded: query head of the group and dimension. place: its column in the weight.
    inner = tl.arange(0, BLOCK_GROUP * BLOCK_DIM)
    in_inner = (inner // BLOCK_DIM < GROUP) & (inner % BLOCK_DIM < HEAD_DIM)
    place = (kv_head * GROUP + inner // BLOCK_DIM) * HEAD_DIM + inner % BLOCK_DIM
    first = kv_head * GROUP * HEAD_DIM
    for step in tl.static_range(COL_STEPS):
        cols = weight_columns(first_step + step, outputs, weight_ptr, weight_row_stride, BLOCK_COLS)
        prefetch_weight(cols, first, first + GROUP * HEAD_DIM, token_tile == 0, DEPENDENT)
    await_inputs(DEPENDENT)

    rows = tl.arange(0, BLOCK_TOKENS * BLOCK_GROUP)
    token = token_tile * BLOCK_TOKENS + rows // BLOCK_GROUP
    head = kv_head * GROUP + rows % BLOCK_GROUP
    dims = tl.arange(0, BLOCK_DIM)
    in_rows, in_dims = (token < tokens) & (rows % BLOCK_GROUP < GROUP), dims < HEAD_DIM
    q_tile = q_ptr + batch * q_batch_stride + (token * q_token_stride + head * q_head_stride)[:, None]
    q = tl.load(q_tile + dims[None, :], mask=in_rows[:, None] & in_dims[None, :], other=0.0).to(COMPUTE)
    attended = attend(
        q,
        k_ptr + batch * k_batch_stride + kv_head * k_head_stride + dims[None, :],
        v_ptr + batch * v_batch_stride + kv_head * v_head_stride + dims[None, :],
        mask_ptr + batch * mask_batch_stride + (token * mask_token_stride)[:, None],
        in_rows,
        in_dims,
        keys,
        k_key_stride,
        v_key_stride,
        mask_key_stride,
        scale_log2,
        COMPUTE,
        PRECISION,
        BLOCK_KEYS,
    )
    x = tl.reshape(attended.to(q_ptr.dtype.element_ty), [BLOCK_TOKENS, BLOCK_GROUP * BLOCK_DIM])
    own = token_tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    size: tl.constexpr = BLOCK_TOKENS * BLOCK_COLS
    parts = partials_ptr + tile.to(tl.int64) * (COL_STEPS * KV_HEADS * size)
    for step in tl.static_range(COL_STEPS):
        col = (first_step + step) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        # The last part, so that no part is added to the residual's many digits but the sum of all others.
        mask = (own < tokens)[:, None] & ((col < outputs) & (kv_head == KV_HEADS - 1))[None, :]
        residual_rows = residual_ptr + (batch * tokens + own)[:, None] * residual_row_stride
        residual = tl.load(residual_rows + col[None, :], mask=mask, other=0.0)
        cols = weight_columns(first_step + step, outputs, weight_ptr, weight_row_stride, BLOCK_COLS)
        weight = tl.load(cols + place[:, None], mask=in_inner[:, None], other=0.0)
        y = tl.dot(x.to(weight.dtype), weight, input_precision=PRECISION) + residual.to(tl.float32)
        store_part(y, parts + step * (KV_HEADS * size), kv_head, BLOCK_TOKENS, BLOCK_COLS)
    if arrives_last(arrivals_ptr + tile, KV_HEADS):
        for step in tl.static_range(COL_STEPS):
            store_sums(
                sum_of_parts(parts + step * (KV_HEADS * size), KV_HEADS, BLOCK_TOKENS, BLOCK_COLS),
                own,
                first_step + step,
                batch,
                tokens,
                all_rows,
                outputs,
                y_ptr,
                next_weight_ptr,
                next_rows_ptr,
                next_squares_ptr,
                HAS_NEXT,
                BLOCK_COLS,
            )


def attention_residual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    weight: Tensor,
    residual: Tensor,
    *,
    out: Tensor | None = None,
    memory: Any = None,
    next_norm: Any = None,
) -> Tensor:
    """``y = residual + masked_attention(q, k, v, mask) · weightᵀ``.

    q, k, v, mask  as in ``masked_attention``      weight  [O, H·D]      residual  [B, T, O]  fp32 | bf16 | fp16 each
    out, memory    not used      next_norm  as in ``linear_residual``
    returns        [B, T, O]  what weight and residual promote to
    numerics       as ``masked_attention`` and ``linear_residual``, products of fp32 as ``tuning.fp32_precision`` says
    errors         ValueError for other shapes or dtypes, quantised weights, no keys, more than 16 KV heads, or heads that do
                   not fit into a tile
    replaces       ``eager_attention_forward``, ``o_proj`` and the in-place add behind them
    """
    op = "attention_residual"
    batch, tokens, heads, keys, kv_heads, head_dim = check_attention(op, q, k, v, mask)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{op}: the weight is quantised; accepted is a plain one")
    outputs = weight.shape[0]
    check(op, "weight", weight, (outputs, heads * head_dim), like=q)
    check(op, "residual", residual, (batch, tokens, outputs), like=q)
    dtype = torch.promote_types(weight.dtype, residual.dtype)
    y = torch.empty(batch, tokens, outputs, dtype=dtype, device=q.device)
    if not y.numel():
        return y
    residual = as_rows(residual)
    group, block_dim = heads // kv_heads, head_block(head_dim)
    block_group = triton.next_power_of_2(group)
    compute = torch.promote_types(q.dtype, k.dtype)
    cc = capability(q.device)
    widest = max(compute.itemsize, v.dtype.itemsize, weight.dtype.itemsize)
    tile = attention_residual_tile(
        tokens, outputs, keys, kv_heads, block_group * block_dim, block_group, widest, cc
    )
    tiles = batch * triton.cdiv(tokens, tile.rows) * triton.cdiv(outputs, tile.cols)
    partials, arrivals = split_workspace(tiles, kv_heads, tile.rows * tile.cols, q.device)
    cols = min(tile.cols, COLS_AT_ONCE)
    flags, next_pointers = allocate_for_next_norm(next_norm, y, cols)
    _attention_residual_fwd[(tiles, kv_heads)](
        q,
        k,
        v,
        mask,
        weight,
        residual,
        y,
        *next_pointers,
        partials,
        arrivals,
        tokens,
        batch * tokens,
        keys,
        outputs,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *mask.stride(),
        weight.stride(0),
        residual.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        GROUP=group,
        HEAD_DIM=head_dim,
        KV_HEADS=kv_heads,
        COMPUTE=TYPES[compute],
        PRECISION=fp32_precision(cc),
        **flags,
        **dependent_launch(cc),
        BLOCK_TOKENS=tile.rows,
        BLOCK_COLS=cols,
        COL_STEPS=tile.cols // cols,
        BLOCK_KEYS=tile.inner,
        BLOCK_GROUP=block_group,
        BLOCK_DIM=block_dim,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y
