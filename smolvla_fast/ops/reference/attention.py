"""Unmasked attention of the vision tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Cost, randn

CASES = (
    dict(N=2, T=1024, H=12, D=64),
    dict(N=1, T=1024, H=12, D=64),
    dict(N=2, T=64, H=3, D=16),
    dict(N=1, T=37, H=2, D=24),
)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``softmax(q·kᵀ / sqrt(D)) · v`` for every head; every patch sees every patch of its own image.

    q, k, v  [N, T, H·D]        returns  [N, T, H·D]  contiguous
    replaces the attention of ``SmolVLMVisionAttention`` (transformers, sdpa)
    """
    q, k, v = (x.view(*x.shape[:-1], heads, -1).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    return out.transpose(1, 2).contiguous().flatten(2)


def make_inputs(
    case: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor | int]:
    n, t, h, d = (case[name] for name in "NTHD")
    q, k, v = (randn(n, t, h * d, dtype=dtype, generator=generator, scale=s) for s in (2.0, 1.0, 1.0))
    return {"q": q, "k": k, "v": v, "heads": h}


def cost(case: dict[str, int], itemsize: int) -> Cost:
    n, t, h, d = (case[name] for name in "NTHD")
    return Cost(flops=4.0 * n * h * t * t * d, bytes=4.0 * itemsize * n * t * h * d)
