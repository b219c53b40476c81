"""Grouped attention under a mask without copying a KV head for each of its query heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import Memory


def prepare_mask(mask: Tensor) -> Tensor:
    """[B, T, S] bool -> [B, 1, 1, T, S] fp32: 0 where visible, else the lowest finite value.

    Finite, so that a row that sees nothing stays a number; scores are far too small to move it.
    """
    lowest = torch.finfo(torch.float32).min
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, lowest)[:, None, None]


def visible(mask: Tensor) -> Tensor:
    """A mask in either form as [B, T, S] bool."""
    return mask if mask.dtype is torch.bool else mask[:, 0, 0] == 0


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, memory: Memory | None = None
) -> Tensor:
    """See ``reference.masked_attention``; ``mask`` in either form. Returns the dtype of q."""
    if mask.dtype is torch.bool:
        mask = prepare_mask(mask)
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    rows = (q * head_dim**-0.5).view(batch, tokens, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4).float()
    columns = k.permute(0, 2, 3, 1).float()[:, :, None]
    scores = torch.matmul(rows, columns).add_(mask)
    probs = torch.softmax(scores, dim=-1)
    out = torch.matmul(probs, v.permute(0, 2, 1, 3).float()[:, :, None]).to(q.dtype)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads * head_dim)


def fused_masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, memory: Memory | None = None
) -> Tensor:
    """``masked_attention`` by torch's fused attention; ``mask`` in either form."""
    return attention_with_grad(q, k, v, visible(mask))


def attention_with_grad(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``reference.masked_attention`` with a backward, by torch's fused attention; mask [B, T, S] bool.

    returns  [B, T, H·D] in the widest dtype of q, k and v; a row with no True sees every key, where the reference weighs
             them alike: nothing reads such a row, it has but to stay a number
    The query heads of a KV head are rows of one problem, so no key or value is copied, whoever computes it.
    """
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    rows = q.to(dtype).view(batch, tokens, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    seen = (mask | ~mask.any(-1, keepdim=True))[:, None, None]
    out = F.scaled_dot_product_attention(
        rows.reshape(batch, kv_heads, group * tokens, head_dim),
        k.to(dtype).transpose(1, 2),
        v.to(dtype).transpose(1, 2),
        attn_mask=seen.expand(batch, 1, group, tokens, keys).reshape(batch, 1, group * tokens, keys),
    )
    out = out.view(batch, kv_heads, group, tokens, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, tokens, heads * head_dim)
