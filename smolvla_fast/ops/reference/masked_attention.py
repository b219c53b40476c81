"""Grouped-query attention under a boolean mask: the one attention of text and expert layers (prefix, suffix, cross)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..memory import Memory
from . import Cost, compute_dtype, randn

# 113/177/241: prefix of 1/2/3 cameras with 48 language tokens. 227: two cameras plus a chunk of 50.
CASES = (
    dict(B=1, T=177, S=177, H=15, K=5, D=64),
    dict(B=1, T=50, S=177, H=15, K=5, D=64),
    dict(B=1, T=50, S=227, H=15, K=5, D=64),
    dict(B=2, T=7, S=19, H=3, K=1, D=16),
    dict(B=3, T=1, S=33, H=4, K=4, D=8),
)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, memory: Memory | None = None
) -> Tensor:
    """``softmax(q·kᵀ / sqrt(D), where mask) · v``, each KV head serving ``H / K`` query heads in turn.

    q        [B, T, H, D]                k, v  [B, S, K, D]  strided views of a cache are welcome
    mask     [B, T, S]  bool, True where the query may look; a row with no True looks at every key alike
    memory   see ``ops.memory``
    returns  [B, T, H·D]  dtype of v
    numerics q and k widened to fp32, scores and softmax fp32, probabilities rounded to the dtype of v
    replaces ``eager_attention_forward`` of LeRobot's ``SmolVLMWithExpertModel``
    """
    batch, keys, kv_heads, head_dim = k.shape
    group = q.shape[2] // kv_heads
    spread = (batch, keys, kv_heads, group, head_dim)
    # The copies below are what stock does; a view would hand the matrix product other strides, hence other bits.
    k = k[:, :, :, None, :].expand(spread).reshape(batch, keys, kv_heads * group, head_dim)
    v = v[:, :, :, None, :].expand(spread).reshape(batch, keys, kv_heads * group, head_dim)

    wide = compute_dtype(q)
    scores = torch.matmul(q.to(wide).transpose(1, 2), k.to(compute_dtype(k)).transpose(1, 2).transpose(2, 3))
    scores *= head_dim**-0.5
    scores = torch.where(mask[:, None, :, :], scores, torch.finfo(scores.dtype).min)
    probs = nn.functional.softmax(scores, dim=-1).to(v.dtype)
    out = torch.matmul(probs, v.permute(0, 2, 1, 3))
    return out.permute(0, 2, 1, 3).reshape(batch, -1, kv_heads * group * head_dim)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs for one case; the last rows of the mask see everything, the first see one key, a few keys are padding."""
    b, t, s, h, kv, d = (case[name] for name in "BTSHKD")
    mask = torch.ones(b, t, s, dtype=torch.bool).tril(diagonal=max(s - t, 0))
    mask[:, :, s // 3 : s // 3 + 2] = False
    return {
        "q": randn(b, t, h, d, dtype=dtype, generator=generator, scale=2.0),
        "k": randn(b, s, kv, d, dtype=dtype, generator=generator),
        "v": randn(b, s, kv, d, dtype=dtype, generator=generator),
        "mask": mask,
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    b, t, s, h, kv, d = (case[name] for name in "BTSHKD")
    return Cost(flops=4.0 * b * h * t * s * d, bytes=float(itemsize) * b * d * (2 * t * h + 2 * s * kv))
