"""Grouped-query attention under a mask, one program a tile of query rows of one KV head.

The query heads of a KV head are rows of the same tile, so its keys and values are read once for all of them and 50
tokens of 3 heads fill 10 tiles of 16 rows where head by head they would take 12. A tile sees its keys in blocks:
running maximum, sum and output stay in registers in fp32. Rows are few, so short tiles that fill the device, and at
SmolVLA's lengths one block that holds all keys, bound the time by one trip to memory and not by arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tuning import masked_attention_tile
from .common import capability, check, on_tensor_cores
from .dependent_launch import await_inputs, dependent_launch
from .tuning import fp32_precision, head_block

# Finite, so that a row that sees nothing weighs all its keys alike; keys that do not exist get -inf instead.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def attend(
    q,
    k_tile,
    v_tile,
    mask_tile,
    in_rows,
    in_dims,
    keys,
    k_key_stride,
    v_key_stride,
    mask_key_stride,
    scale_log2,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """softmax(q·kᵀ, where mask)·v of a tile of rows, in fp32. Pointers to key 0: k_tile, v_tile [1, D], mask_tile [R, 1]."""
    best = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    out = tl.zeros(q.shape, tl.float32)
    for start in range(0, keys, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        in_keys = key < keys
        here = in_keys[:, None] & in_dims[None, :]
        k = tl.load(k_tile + key[:, None] * k_key_stride, mask=here, other=0.0).to(COMPUTE)
        v = tl.load(v_tile + key[:, None] * v_key_stride, mask=here, other=0.0)
        visible = tl.load(
            mask_tile + key[None, :] * mask_key_stride, mask=in_rows[:, None] & in_keys[None, :], other=0
        ).to(tl.int1)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(visible, scores, LOWEST)
        scores = tl.where(in_keys[None, :], scores, float("-inf"))
        # Every block has a key that exists, so the maximum is never -inf and no difference below is inf - inf.
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp2(best - new_best)
        weights = tl.exp2(scores - new_best[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        best = new_best
    return out / total[:, None]


@triton.jit
def _masked_attention_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    tokens,
    keys,
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
    out_batch_stride,
    out_token_stride,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_DIM)
    in_rows = token < tokens
    in_dims = dims < HEAD_DIM
    inside = in_rows[:, None] & in_dims[None, :]
    await_inputs(DEPENDENT)

    q_tile = q_ptr + batch * q_batch_stride + (token * q_token_stride + head * q_head_stride)[:, None]
    q = tl.load(q_tile + dims[None, :], mask=inside, other=0.0).to(COMPUTE)
    k_tile = k_ptr + batch * k_batch_stride + kv_head * k_head_stride + dims[None, :]
    v_tile = v_ptr + batch * v_batch_stride + kv_head * v_head_stride + dims[None, :]
    mask_tile = mask_ptr + batch * mask_batch_stride + (token * mask_token_stride)[:, None]

    out = attend(
        q,
        k_tile,
        v_tile,
        mask_tile,
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
    out_tile = out_ptr + batch * out_batch_stride + (token * out_token_stride + head * HEAD_DIM)[:, None]
    tl.store(out_tile + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


def check_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> tuple[int, int, int, int, int, int]:
    """(B, T, H, S, K, D). Raises ValueError where they do not fit."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"{op}: q and k have shapes {list(q.shape)} and {list(k.shape)}; "
            "accepted are [B, T, H, D] and [B, S, K, D]"
        )
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if keys == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{op}: {heads} query heads over {kv_heads} KV heads of {keys} keys; accepted is at "
            "least one key, and query heads that are a multiple of the KV heads"
        )
    check(op, "q", q, (batch, tokens, heads, head_dim))
    check(op, "k", k, (batch, keys, kv_heads, head_dim), like=q)
    check(op, "v", v, (batch, keys, kv_heads, head_dim), like=q)
    if mask.dtype is not torch.bool or mask.shape != (batch, tokens, keys) or mask.device != q.device:
        raise ValueError(
            f"{op}: mask is {mask.dtype}, {list(mask.shape)}, on {mask.device}; "
            f"accepted is torch.bool, {[batch, tokens, keys]}, on {q.device}"
        )
    return batch, tokens, heads, keys, kv_heads, head_dim


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, memory: Any = None) -> Tensor:
    """``softmax(q·kᵀ / sqrt(D), where mask) · v``, each KV head serving ``H / K`` query heads in turn.

    q        [B, T, H, D]      k, v  [B, S, K, D]  fp32 | bf16 | fp16 each, strided views of a cache are welcome
    mask     [B, T, S]  bool, any strides; a row with no True looks at every key alike
    memory   not used
    returns  [B, T, H·D]  dtype of q, in which the product that follows has its weight
    numerics scores in the wider dtype of q and k (fp32: ``tuning.fp32_precision``), scaled and summed in fp32, softmax fp32,
             probabilities rounded to the dtype of v for the second product; equal bits in every run
    errors   ValueError for other shapes, dtypes, no keys, or D above tuning.MAX_HEAD_DIM
    replaces ``eager_attention_forward`` of LeRobot's ``SmolVLMWithExpertModel``: prefix, suffix and cross attention
    """
    batch, tokens, heads, keys, kv_heads, head_dim = check_attention("masked_attention", q, k, v, mask)
    block_dim = head_block(head_dim)
    out = torch.empty(batch, tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    group = heads // kv_heads
    compute = torch.promote_types(q.dtype, k.dtype)
    cc = capability(q.device)
    narrow = on_tensor_cores(cc, compute, v.dtype)
    tile = masked_attention_tile(batch * kv_heads, tokens * group, keys, block_dim, narrow, cc)
    _masked_attention_fwd[(triton.cdiv(tokens * group, tile.rows), kv_heads, batch)](
        q,
        k,
        v,
        mask,
        out,
        tokens,
        keys,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *mask.stride(),
        *out.stride()[:2],
        math.log2(math.e) / math.sqrt(head_dim),
        GROUP=group,
        HEAD_DIM=head_dim,
        COMPUTE=TYPES[compute],
        PRECISION=fp32_precision(cc),
        **dependent_launch(cc),
        BLOCK_ROWS=tile.rows,
        BLOCK_KEYS=tile.keys,
        BLOCK_DIM=block_dim,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
