"""Attention by a named library, without torch's choice between them: that has global flags, and prefers another one on each
GPU and in each release.

    flash-sdpa   FlashAttention-2 as torch brings it        cudnn   cuDNN's        flash   the package flash-attn

All take fp16 and bf16 on NVIDIA GPUs from 8.0 on and run in a CUDA graph as they are: nothing random is drawn, and memory is
the caching allocator's. Each reads [N, T, H, D] where it lies and writes the same, so that a call is one launch; only
FlashAttention shares the keys between programs, and adds them up in a second launch, where there are few rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
WIDEST = {"flash": 256, "flash-sdpa": 256, "cudnn": 128}
"""Head size, by the documentation of the package and by what torch asks before it takes them."""
CUDNN_ANY_LENGTH = 91501
"""cuDNN 9.15.1: before it sequences that are no multiple of 128 went wrong (pytorch issue 169849), and torch prefers it to
FlashAttention from there on."""


def why_not(name: str) -> str | None:
    """Why this installation lacks a library's attention, whatever the GPU, or None."""
    if name == "flash":
        return None if find_spec("flash_attn") else "the package flash-attn is not installed"
    if name == "flash-sdpa":
        asked = getattr(torch.backends.cuda, "is_flash_attention_available", None)
        return None if asked is not None and asked() else "this torch was built without FlashAttention"
    if not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    call = getattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", None)
    takes = [] if call is None else [each.name for each in call.default._schema.arguments]
    return None if "attn_bias" in takes else "this torch's call of it is older than torch 2.6's"


def takes(name: str, tokens: int, head_dim: int, dtype: object) -> bool:
    """Whether a library serves these sizes without copies of its operands."""
    if dtype not in DTYPES or head_dim > WIDEST[name] or head_dim % 8:
        return False
    return name != "cudnn" or tokens % 128 == 0 or (torch.backends.cudnn.version() or 0) >= CUDNN_ANY_LENGTH


def flash(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """See ``reference.attention``.    q, k, v  [N, T, H·D] fp16 or bf16 on an NVIDIA GPU"""
    from flash_attn import flash_attn_func

    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    # [N, T, H, D], as it takes them.
    return flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5).flatten(2)


def flash_sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The same by what torch has of FlashAttention."""
    q, k, v = _of_heads(heads, q, k, v)
    call = torch.ops.aten._scaled_dot_product_flash_attention
    return _joined(call(q, k, v, scale=q.shape[-1] ** -0.5)[0])


def cudnn(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The same by cuDNN."""
    q, k, v = _of_heads(heads, q, k, v)
    call = torch.ops.aten._scaled_dot_product_cudnn_attention
    return _joined(call(q, k, v, None, False, scale=q.shape[-1] ** -0.5)[0])


ATTENTION = {"flash-sdpa": flash_sdpa, "cudnn": cudnn, "flash": flash}


def _of_heads(heads: int, *tensors: Tensor) -> Iterator[Tensor]:
    """Views [N, H, T, D]."""
    return (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in tensors)


def _joined(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)
