"""RMSNorm of prepared rows, query, key and value projections, rotation, write into the cache; csrc/cuda/norm_products.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..next_norm import NextNorm
from . import library
from .prepared_rows import prepared_rows, why_not_prepared

Weights = tuple[Any, Any, Any]
Rope = tuple[Tensor, Tensor]
Slots = tuple[Tensor, Tensor]
_SLOTS = (torch.float32, torch.bfloat16)
_FP32 = (torch.float32,)


def _used(weights: Weights, slots: Slots | None) -> Weights:
    """Without a key's or a value's weight where there is no other, or no slot."""
    q, k, v = weights
    return (q, None, None) if k is None or v is None or slots is None else (q, k, v)


def why_not_norm_qkv_rope(
    x: Tensor, norm: Any, weights: Weights, rope: Rope, slots: Slots | None, *,
    memory: Any = None, normed: NextNorm | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel has no code for these operands, or None."""
    used = _used(weights, slots)
    half = rope[0].shape[-1]
    if half % 2 or not half:
        return f"heads of {2 * half}; accepted are multiples of 4"
    if any(table.data_ptr() % 8 for table in rope):
        return "a table of rope begins at an address that is no multiple of 8 bytes"
    if slots is not None and used[1] is not None:
        k, v = slots
        if k.dtype not in _SLOTS or v.dtype is not k.dtype:
            return f"slots are {k.dtype} and {v.dtype}; accepted are float32 and bfloat16, one for both"
        if k.stride(0) % 2 or k.stride(1) % 2 or any(each.data_ptr() % (2 * k.itemsize) for each in slots):
            return f"slots have strides {k.stride()}; accepted are even ones, and addresses of whole pairs"
    return why_not_prepared(x, [weight for weight in used if weight is not None], normed)


def norm_qkv_rope(
    x: Tensor,
    norm: tuple[Tensor, float],
    weights: Weights,
    rope: Rope,
    slots: Slots | None,
    *,
    memory: Any = None,
    normed: NextNorm | None = None,
) -> Tensor | None:
    """``h = rms_norm(x);  q = rope(h·Wqᵀ);  slots ← rope(h·Wkᵀ), h·Wvᵀ``.

    x        [B, T, M]  not read, M a multiple of 8 up to 1024      norm  (weight [M], eps), the weight not read
    weights  q [H·D, M] or None; k, v [K·D, M] or None; bf16, D a multiple of 4, rows at multiples of 16 bytes
    rope     (sin, cos), each [B or 1, T, 1, D/2] fp32, contiguous
    slots    k, v  [B, T, K, D]  fp32 | bf16  views of the cache, written, or None; one dtype and the same, even strides,
             heads side by side
    memory   not used
    normed   ``ops.next_norm.NextNorm`` of x and this norm, filled in with bf16 rows
    returns  q [B, T, H, D]  bf16, fresh, or None
    numerics products of bf16 with fp32 sums, 1/rms applied to them, rotation in fp32, one rounding; parts of K are added in
             their order, so bits are equal in every run
    errors   ValueError for other shapes, strides, dtypes or devices, or neither queries nor keys and values;
             ``why_not_norm_qkv_rope`` tells beforehand. RuntimeError for a device that does not run it
             (``why_no_norm_products``), or with CUDA's own words
    replaces the first half of ``forward_attn_layer`` / ``forward_cross_attn_layer``
    """
    op = "norm_qkv_rope"
    used = _used(weights, slots)
    there = [weight for weight in used if weight is not None]
    if not there:
        raise ValueError(f"{op} needs a weight of q, or weights and slots of k and v, or all; got neither")
    reason = why_not_norm_qkv_rope(x, norm, weights, rope, slots, normed=normed)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")
    batch, tokens, _ = x.shape
    sin, cos = rope
    half = sin.shape[-1]
    for table in rope:
        shape = (1 if len(sin) == 1 else batch, tokens, 1, half)
        library.check(op, "a table of rope", table, shape, _FP32, like=x)
    q_heads, kv_heads, _ = (0 if weight is None else weight.shape[0] // (2 * half) for weight in used)
    for weight, heads in zip(used, (q_heads, kv_heads, kv_heads), strict=True):
        if weight is not None and weight.shape[0] != heads * 2 * half:
            raise ValueError(
                f"{op}: a weight has {weight.shape[0]} rows; accepted are {heads * 2 * half}, whole heads of {2 * half}"
            )
    k, v = slots if slots is not None and used[1] is not None else (None, None)
    strides = (0, 0)
    if k is not None and v is not None:
        for name, slot in (("slots.k", k), ("slots.v", v)):
            library.check(
                op, name, slot, (batch, tokens, kv_heads, 2 * half), _SLOTS, like=x, contiguous=False
            )
        if k.stride() != v.stride() or k.stride(3) != 1 or (kv_heads > 1 and k.stride(2) != 2 * half):
            raise ValueError(
                f"{op}: slots.k has strides {k.stride()}, slots.v {v.stride()}; accepted are the same for both, "
                f"with {2 * half} between heads"
            )
        strides = (k.stride(0), k.stride(1))
    q = None
    if used[0] is not None:
        q = torch.empty(batch, tokens, q_heads, 2 * half, dtype=torch.bfloat16, device=x.device)
    inputs, sizes, more = prepared_rows(op, x, norm, there, normed)
    if batch and tokens and q_heads + kv_heads:
        # A launch goes to the device that is current.
        with torch.cuda.device_of(x):
            library.library(x.device).norm_qkv_rope(
                inputs=[*inputs, *(library.address(each) for each in (*used, sin, cos))],
                outputs=[library.address(each) for each in (q, k, v)],
                fp32_slots=k is not None and k.dtype is torch.float32,
                strides=(
                    *(0 if weight is None else weight.stride(0) for weight in used),
                    0 if len(sin) == 1 else sin.stride(0),
                    *strides,
                ),
                sizes=(*sizes, tokens, q_heads, kv_heads, half),
                **more,
            )
    return q
