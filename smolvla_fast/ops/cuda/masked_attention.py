"""The attention of text and expert layers; csrc/cuda/masked_attention.cu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.launch_order import take_may_begin_early
from . import library

MAX_HEAD_DIM = 128
# What CUDA accepts as the second and third extent of a grid: KV heads and samples.
_MAX_BLOCKS = 65535
_NARROW = (torch.bfloat16, torch.float16)


def why_not_attention(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel has no code for these dtypes or this head size, or None."""
    name = {t: str(t.dtype).removeprefix("torch.") for t in (q, k, v)}
    if q.dtype not in _NARROW or k.dtype not in (q.dtype, torch.float32) or v.dtype != k.dtype:
        return (
            f"q is {name[q]}, k {name[k]}, v {name[v]}; accepted is q in bfloat16 or float16, with k and v both "
            "as q or both in float32"
        )
    if q.shape[-1] % 8 or not 0 < q.shape[-1] <= MAX_HEAD_DIM:
        return f"head size {q.shape[-1]}; accepted are multiples of 8 up to {MAX_HEAD_DIM}"
    return None


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, memory: Any = None) -> Tensor:
    """``softmax(q·kᵀ / sqrt(D), where mask) · v``, each KV head serving ``H / K`` query heads in turn.

    q        [B, T, H, D]  bf16 | fp16      k, v  [B, S, K, D]  both as q or both fp32
             views with elements of a head side by side: q aligned to 4 bytes, k and v to 16, D a multiple of 8 up to 128
    mask     [B, T, S]  bool, any strides; a row with no True looks at every key alike      memory  not used
    returns  [B, T, H·D]  dtype of q, in which the product that follows has its weight
    numerics products on tensor cores with fp32 sums, softmax fp32, probabilities rounded to the dtype of v. fp32 k and v
             are taken as the sum of two bf16, and so are the probabilities then: 16 bits of each mantissa. Equal bits in
             every run
    errors   ValueError for other shapes, strides, dtypes or devices; fp32 queries are among them, ``why_not_attention``
             tells beforehand. RuntimeError for a device that is no NVIDIA GPU, or with CUDA's own words
    replaces ``eager_attention_forward`` of LeRobot's ``SmolVLMWithExpertModel``
    """
    batch, tokens, keys = _check("masked_attention", q, k, v)
    library.check(
        "masked_attention", "mask", mask, (batch, tokens, keys), (torch.bool,), like=q, contiguous=False
    )
    return _launch(q, k, v, mask)


def masked_attention_or_fallback(
    fallback: Callable[..., Tensor], prepare_mask: Callable[[Tensor], Any]
) -> Callable[..., Tensor]:
    """``masked_attention``, by ``fallback`` where the kernel has no code for dtypes or head size: queries in fp32 are for
    CUDA cores, where tensor cores have nothing to win. ``prepare_mask`` makes the mask that ``fallback`` reads."""

    def serve(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, memory: Any = None) -> Tensor:
        if why_not_attention(q, k, v) is None:
            return masked_attention(q, k, v, mask)
        return fallback(q, k, v, prepare_mask(mask))

    return serve


def _check(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int]:
    """Raise ValueError for what the kernel does not take; samples, queries and keys of what it does."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"{op}: q and k have shapes {list(q.shape)} and {list(k.shape)}; accepted are [B, T, H, D] and [B, S, K, D]"
        )
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if keys == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{op}: {heads} query heads over {kv_heads} KV heads of {keys} keys; accepted is at least one key, and "
            "query heads that are a multiple of the KV heads"
        )
    if max(batch, kv_heads) > _MAX_BLOCKS or tokens * heads >= 2**31:
        raise ValueError(
            f"{op}: {batch} samples, {kv_heads} KV heads, {tokens} queries of {heads} heads; accepted are at most "
            f"{_MAX_BLOCKS} samples and KV heads, and fewer than 2**31 rows"
        )
    reason = why_not_attention(q, k, v)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")
    for name, tensor, length, of, aligned in (
        ("q", q, tokens, heads, 4),
        ("k", k, keys, kv_heads, 16),
        ("v", v, keys, kv_heads, 16),
    ):
        library.check(
            op, name, tensor, (batch, length, of, head_dim), like=q, contiguous=False, aligned=aligned
        )
        steps = [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
        if tensor.stride(3) != 1 or any(step * tensor.element_size() % aligned for step in steps[:-1]):
            raise ValueError(
                f"{op}: {name} has strides {tensor.stride()}; accepted are elements of a head side by side and heads "
                f"at multiples of {aligned} bytes; call .contiguous() on it"
            )
    return batch, tokens, keys


def _launch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    kernels = library.library(q.device)
    out = torch.empty(batch, tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    # A launch goes to the device that is current.
    with torch.cuda.device_of(q):
        kernels.masked_attention(
            inputs=[library.address(tensor) for tensor in (q, k, v)],
            dtypes=[library.DTYPES.index(tensor.dtype) for tensor in (q, k)],
            mask=library.address(mask),
            out=library.address(out),
            strides=[tensor.stride()[:3] for tensor in (q, k, v, mask)],
            sizes=(batch, tokens, heads, head_dim, keys, kv_heads),
            dependent=take_may_begin_early() and library.begins_early(q.device),
            stream=library.stream(q.device),
        )
    return out
