"""The gradient of grouped-query attention under a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Cost, compute_dtype, randn
from . import masked_attention as forward

# The expert's self attention over 2 cameras, batch 8; then the forward's odd cases.
CASES = (
    dict(B=8, T=50, S=227, H=15, K=5, D=64),
    dict(B=2, T=7, S=19, H=3, K=1, D=16),
    dict(B=3, T=1, S=33, H=4, K=4, D=8),
)


def masked_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``dv = pᵀ·g``, ``ds = p·(g·vᵀ - Σ g·out)`` where visible, ``dq = ds·k / sqrt(D)``, ``dk = dsᵀ·q / sqrt(D)``.

    q         [B, T, H, D]      k, v  [B, S, K, D]      mask  [B, T, S]  bool      p  the forward's probabilities
    out       [B, T, H·D]  what the forward gave      grad  [B, T, H·D]  g, the gradient to it
    returns   dq, dk, dv in the shapes and dtypes of q, k and v; a KV head's is summed over its query heads
    numerics  in fp32, rounded once
    replaces  autograd's backward of ``eager_attention_forward`` of LeRobot's ``SmolVLMWithExpertModel``
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    wide = compute_dtype(q)
    grouped = (batch, tokens, kv_heads, heads // kv_heads, head_dim)
    rows, g, o = (x.to(wide).reshape(grouped) for x in (q, grad, out))
    columns, values = k.to(wide), v.to(wide)
    scores = torch.einsum("btkgd,bskd->bkgts", rows, columns) * head_dim**-0.5
    visible = mask[:, None, None]
    p = torch.softmax(torch.where(visible, scores, torch.finfo(wide).min), dim=-1)
    delta = (g * o).sum(-1).permute(0, 2, 3, 1)[..., None]
    ds = torch.where(visible, p * (torch.einsum("btkgd,bskd->bkgts", g, values) - delta), 0.0)
    ds = ds * head_dim**-0.5
    dq = torch.einsum("bkgts,bskd->btkgd", ds, columns).reshape(q.shape)
    dk = torch.einsum("bkgts,btkgd->bskd", ds, rows)
    dv = torch.einsum("bkgts,btkgd->bskd", p, g)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    given = forward.make_inputs(case, dtype, generator)
    out = forward.masked_attention(*given.values())
    return {**given, "out": out, "grad": randn(*out.shape, dtype=dtype, generator=generator)}


def cost(case: dict[str, int], itemsize: int) -> Cost:
    once = forward.cost(case, itemsize)
    return Cost(flops=2.5 * once.flops, bytes=3.0 * once.bytes)
