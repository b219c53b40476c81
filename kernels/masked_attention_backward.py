"""The gradient of grouped-query attention under a mask, in two launches without a sum that depends on the day.

The first has one program a tile of query rows, as the forward: it finds each row's maximum and sum again (the forward keeps
neither, and at SmolVLA's lengths a second look at the keys costs less than the memory would), writes them down, and gives
dq. The second has one program a tile of keys and goes over all rows, so dk and dv are summed in registers in one order and
no atomics are needed. Probabilities and their gradient never reach memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tuning import attention_backward_tile
from .common import capability, check, refuse_graph
from .masked_attention import LOWEST, TYPES, masked_attention
from .tuning import fp32_precision, head_block


@triton.jit
def _scores(q, k, visible, in_keys, scale_log2, PRECISION: tl.constexpr):
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    scores = tl.where(visible, scores, LOWEST)
    return tl.where(in_keys[None, :], scores, float("-inf"))


@triton.jit
def _masked_attention_backward_rows(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    grad_ptr,
    dq_ptr,
    best_ptr,
    total_ptr,
    delta_ptr,
    tokens,
    keys,
    kv_heads,
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
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
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

    q_tile = q_ptr + batch * q_batch_stride + (token * q_token_stride + head * q_head_stride)[:, None]
    q = tl.load(q_tile + dims[None, :], mask=inside, other=0.0).to(COMPUTE)
    place = batch * out_batch_stride + (token * out_token_stride + head * HEAD_DIM)[:, None] + dims[None, :]
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(COMPUTE)
    out = tl.load(out_ptr + place, mask=inside, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    k_tile = k_ptr + batch * k_batch_stride + kv_head * k_head_stride + dims[None, :]
    v_tile = v_ptr + batch * v_batch_stride + kv_head * v_head_stride + dims[None, :]
    mask_tile = mask_ptr + batch * mask_batch_stride + (token * mask_token_stride)[:, None]

    best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, keys, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        in_keys = key < keys
        here = in_keys[:, None] & in_dims[None, :]
        k = tl.load(k_tile + key[:, None] * k_key_stride, mask=here, other=0.0).to(COMPUTE)
        seen = in_rows[:, None] & in_keys[None, :]
        visible = tl.load(mask_tile + key[None, :] * mask_key_stride, mask=seen, other=0).to(tl.int1)
        scores = _scores(q, k, visible, in_keys, scale_log2, PRECISION)
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        total = total * tl.exp2(best - new_best) + tl.sum(tl.exp2(scores - new_best[:, None]), axis=1)
        best = new_best

    dq = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for start in range(0, keys, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        in_keys = key < keys
        here = in_keys[:, None] & in_dims[None, :]
        k = tl.load(k_tile + key[:, None] * k_key_stride, mask=here, other=0.0).to(COMPUTE)
        v = tl.load(v_tile + key[:, None] * v_key_stride, mask=here, other=0.0).to(COMPUTE)
        seen = in_rows[:, None] & in_keys[None, :]
        visible = tl.load(mask_tile + key[None, :] * mask_key_stride, mask=seen, other=0).to(tl.int1)
        scores = _scores(q, k, visible, in_keys, scale_log2, PRECISION)
        weights = tl.exp2(scores - best[:, None]) / total[:, None]
        to_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        # A row that sees nothing weighs its keys alike whatever its scores, so these get no gradient.
        to_scores = tl.where(visible, weights * (to_weights - delta[:, None]), 0.0)
        dq = tl.dot(to_scores.to(COMPUTE), k, dq, input_precision=PRECISION)

    dq_place = batch * tokens * kv_heads * GROUP * HEAD_DIM
    dq_place += ((token * kv_heads * GROUP + head) * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(dq_ptr + dq_place, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)
    statistic = (batch * kv_heads + kv_head) * tokens * GROUP + rows
    tl.store(best_ptr + statistic, best, mask=in_rows)
    tl.store(total_ptr + statistic, total, mask=in_rows)
    tl.store(delta_ptr + statistic, delta, mask=in_rows)


@triton.jit
def _masked_attention_backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    grad_ptr,
    best_ptr,
    total_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tokens,
    keys,
    kv_heads,
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
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    key = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    dims = tl.arange(0, BLOCK_DIM)
    in_keys = key < keys
    in_dims = dims < HEAD_DIM
    here = in_keys[:, None] & in_dims[None, :]
    k_tile = k_ptr + batch * k_batch_stride + kv_head * k_head_stride + key[:, None] * k_key_stride
    v_tile = v_ptr + batch * v_batch_stride + kv_head * v_head_stride + key[:, None] * v_key_stride
    k = tl.load(k_tile + dims[None, :], mask=here, other=0.0).to(COMPUTE)
    v = tl.load(v_tile + dims[None, :], mask=here, other=0.0).to(COMPUTE)

    dk = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    for start in range(0, tokens * GROUP, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        token = rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        in_rows = token < tokens
        inside = in_rows[:, None] & in_dims[None, :]
        q_tile = q_ptr + batch * q_batch_stride + (token * q_token_stride + head * q_head_stride)[:, None]
        q = tl.load(q_tile + dims[None, :], mask=inside, other=0.0).to(COMPUTE)
        place = batch * out_batch_stride + (token * out_token_stride + head * HEAD_DIM)[:, None]
        grad = tl.load(grad_ptr + place + dims[None, :], mask=inside, other=0.0).to(COMPUTE)
        statistic = (batch * kv_heads + kv_head) * tokens * GROUP + rows
        best = tl.load(best_ptr + statistic, mask=in_rows, other=0.0)
        total = tl.load(total_ptr + statistic, mask=in_rows, other=1.0)
        delta = tl.load(delta_ptr + statistic, mask=in_rows, other=0.0)
        mask_tile = mask_ptr + batch * mask_batch_stride + (token * mask_token_stride)[:, None]
        seen = in_rows[:, None] & in_keys[None, :]
        visible = tl.load(mask_tile + key[None, :] * mask_key_stride, mask=seen, other=0).to(tl.int1)

        scores = _scores(q, k, visible, in_keys, scale_log2, PRECISION)
        weights = tl.exp2(scores - best[:, None]) / total[:, None]
        dv = tl.dot(tl.trans(weights.to(COMPUTE)), grad, dv, input_precision=PRECISION)
        to_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        to_scores = tl.where(visible, weights * (to_weights - delta[:, None]), 0.0)
        dk = tl.dot(tl.trans(to_scores.to(COMPUTE)), q, dk, input_precision=PRECISION)

    place = ((batch * keys + key) * kv_heads + kv_head)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(dk_ptr + place, (dk * scale).to(dk_ptr.dtype.element_ty), mask=here)
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=here)


def masked_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``masked_attention(q, k, v, mask)`` to q, k and v.

    q         [B, T, H, D]      k, v  [B, S, K, D]  as the forward took them      mask  [B, T, S]  bool
    out       [B, T, H·D]  what the forward gave      grad  [B, T, H·D]  the gradient to it
    returns   dq, dk, dv in the shapes and dtypes of q, k and v, contiguous
    numerics  products in the widest dtype of q, k and v (fp32: ``tuning.fp32_precision``), sums, softmax and its gradient
              in fp32; equal bits in every run
    errors    ValueError for other shapes or dtypes; what the forward refuses never gets here
    """
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group, shape = heads // kv_heads, (batch, tokens, heads * head_dim)
    # The kernels find both at one place; the gradient of a sum is one number with strides of 0.
    out, grad = out.contiguous(), grad.contiguous()
    check("masked_attention_backward", "out", out, shape, like=q)
    check("masked_attention_backward", "grad", grad, shape, like=q)
    dq = torch.empty(batch, tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    dk = torch.empty(batch, keys, kv_heads, head_dim, dtype=k.dtype, device=q.device)
    dv = torch.empty(batch, keys, kv_heads, head_dim, dtype=v.dtype, device=q.device)
    if not out.numel():
        return dq, dk.zero_(), dv.zero_()
    statistics = [
        torch.empty(batch, kv_heads, tokens * group, dtype=torch.float32, device=q.device) for _ in range(3)
    ]
    compute = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    block_dim, cc = head_block(head_dim), capability(q.device)
    tile = attention_backward_tile(block_dim, compute.itemsize == 2, cc)
    sizes = (tokens, keys, kv_heads, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask.stride())
    scale = 1 / math.sqrt(head_dim)
    last = (*sizes, *out.stride()[:2], scale * math.log2(math.e), scale)
    meta: dict[str, Any] = dict(
        GROUP=group, HEAD_DIM=head_dim, COMPUTE=TYPES[compute], PRECISION=fp32_precision(cc),
        BLOCK_ROWS=tile.rows, BLOCK_KEYS=tile.keys, BLOCK_DIM=block_dim,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    # Not contracted: a product that lanes exchange and add up would be fused with the sum on one side of each exchange, the
    # copies of the sum would differ in the last bit, and which of them goes into shared memory would be chance.
    _masked_attention_backward_rows[(triton.cdiv(tokens * group, tile.rows), kv_heads, batch)](
        q, k, v, mask, out, grad, dq, *statistics, *last, **meta, enable_fp_fusion=False
    )
    _masked_attention_backward_keys[(triton.cdiv(keys, tile.keys), kv_heads, batch)](
        q, k, v, mask, grad, *statistics, dk, dv, *last, **meta
    )
    return dq, dk, dv


class _AttentionWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = masked_attention(q, k, v, mask)
        ctx.save_for_backward(q, k, v, mask, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph("masked_attention")
        q, k, v, mask, out = ctx.saved_tensors
        return (*masked_attention_backward(q, k, v, mask, out, grads[0]), None)


def attention_with_grad(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``masked_attention`` with a backward; arguments, result and errors as there."""
    out: Tensor = _AttentionWithGrad.apply(q, k, v, mask)
    return out
