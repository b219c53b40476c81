"""Attention by the package flash-attn, where that is installed: a candidate for a plan, never a default."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 256
"""Head size, by the package's documentation."""


def is_installed() -> bool:
    return find_spec("flash_attn") is not None


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """See ``reference.attention``.    q, k, v  [N, T, H·D] fp16 or bf16 on an NVIDIA GPU"""
    from flash_attn import flash_attn_func

    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    return flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5).flatten(
        2
    )  # [N, T, H, D], as it takes them
