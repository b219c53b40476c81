"""Attention of the vision tower, every patch to every patch: one program a tile of queries of one head.

Keys and values stream through in blocks while the tile's output, its running maximum and sum stay in registers
(FlashAttention-2, arXiv 2307.08691), so no score is ever written. At 1024 patches of head size 64 the two matrix
products bound the time: long tiles, and more than one stage of loads in flight behind them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tuning import attention_tile
from .common import capability, check, on_tensor_cores
from .dependent_launch import await_inputs, dependent_launch
from .tuning import fp32_precision, head_block


@triton.jit
def _attention_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tokens,
    heads,
    q_image_stride,
    q_token_stride,
    k_image_stride,
    k_token_stride,
    v_image_stride,
    v_token_stride,
    out_image_stride,
    out_token_stride,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    in_dims = dims < HEAD_DIM
    inside = (row < tokens)[:, None] & in_dims[None, :]
    columns = head * HEAD_DIM + dims[None, :]

    await_inputs(DEPENDENT)
    q_tile = q_ptr + image * q_image_stride + row[:, None] * q_token_stride
    q = tl.load(q_tile + columns, mask=inside, other=0.0)
    k_tile = k_ptr + image * k_image_stride + columns
    v_tile = v_ptr + image * v_image_stride + columns

    best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    out = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for start in range(0, tokens, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        in_keys = key < tokens
        here = in_keys[:, None] & in_dims[None, :]
        k = tl.load(k_tile + key[:, None] * k_token_stride, mask=here, other=0.0)
        v = tl.load(v_tile + key[:, None] * v_token_stride, mask=here, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(in_keys[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp2(best - new_best)
        weights = tl.exp2(scores - new_best[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        best = new_best

    out = out / total[:, None]
    out_tile = out_ptr + image * out_image_stride + row[:, None] * out_token_stride
    tl.store(out_tile + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``softmax(q·kᵀ / sqrt(D)) · v`` for every head; every patch sees every patch of its own image.

    q, k, v  [N, T, H·D]  fp32 | bf16 | fp16, one dtype; strided views of a joint projection are welcome
    returns  [N, T, H·D]  contiguous, the same dtype
    numerics scores, softmax and sums fp32, probabilities rounded to the dtype of v; equal bits in every run
    errors   ValueError for other shapes or dtypes, a width that heads does not divide, or D above tuning.MAX_HEAD_DIM
    replaces the attention of ``SmolVLMVisionAttention`` (transformers, sdpa)
    """
    if q.ndim != 3 or heads < 1 or q.shape[2] % heads:
        raise ValueError(
            f"attention: q has shape {list(q.shape)} and heads is {heads}; accepted is [N, T, H·D] with H heads"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check("attention", name, tensor, tuple(q.shape), like=q)
        if tensor.dtype is not q.dtype:
            raise ValueError(f"attention: {name} is {tensor.dtype}, q is {q.dtype}; accepted is one dtype")
    images, tokens, width = q.shape
    head_dim = width // heads
    block_dim = head_block(head_dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    cc = capability(q.device)
    tile = attention_tile(tokens, block_dim, on_tensor_cores(cc, q.dtype), cc)
    _attention_fwd[(triton.cdiv(tokens, tile.rows), images * heads)](
        q,
        k,
        v,
        out,
        tokens,
        heads,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        math.log2(math.e) / math.sqrt(head_dim),
        HEAD_DIM=head_dim,
        PRECISION=fp32_precision(cc),
        **dependent_launch(cc),
        BLOCK_ROWS=tile.rows,
        BLOCK_KEYS=tile.keys,
        BLOCK_DIM=block_dim,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
