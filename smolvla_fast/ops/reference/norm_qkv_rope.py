"""RMSNorm, the query, key and value projections, rotation, and the write of keys and values into their cache slot."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Cost, randn
from .quantize import matched, product
from .rms_norm import rms_norm
from .rope import apply_rope, rope_tables

CASES = (
    dict(B=1, T=177, M=960, H=15, K=5, D=64),
    dict(B=1, T=50, M=720, H=15, K=5, D=64),
    dict(B=1, T=50, M=480, H=15, K=5, D=64),
    dict(B=2, T=7, M=48, H=3, K=1, D=16),
)


def norm_qkv_rope(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    rope: tuple[Tensor, Tensor],
    k_out: Tensor | None,
    v_out: Tensor | None,
    head_dim: int,
) -> Tensor | None:
    """``h = rms_norm(x);  q = rope(h·Wqᵀ);  k_out ← rope(h·Wkᵀ);  v_out ← h·Wvᵀ``.

    x          [B, T, M]                   norm_weight  [M]
    q_weight   [H·D, M] or None (the last text layer leaves only keys and values)
    k, v       [K·D, M] or None (a cross layer of the expert reads keys and values made once a chunk)
    rope       (sin, cos), each [B, T, 1, D/2] fp32: the position offset is in them
    k_out, v_out  [B, T, K, D]  views of the cache, written
    returns    q [B, T, H, D] in the dtype of q_weight, or None
    replaces   the first half of ``forward_attn_layer`` / ``forward_cross_attn_layer``
    """
    h = rms_norm(x, norm_weight, eps)

    def project(weight: Tensor) -> Tensor:
        return product(matched(h, weight), weight).view(*x.shape[:-1], -1, head_dim)

    if k_weight is not None and v_weight is not None and k_out is not None and v_out is not None:
        k_out.copy_(apply_rope(project(k_weight), *rope))
        v_out.copy_(project(v_weight))
    return None if q_weight is None else apply_rope(project(q_weight), *rope)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
    b, t, m, h, kv, d = (case[name] for name in "BTMHKD")
    scale = m**-0.5
    return {
        "x": randn(b, t, m, dtype=dtype, generator=generator, scale=3.0),
        "norm_weight": 1 + randn(m, dtype=dtype, generator=generator, scale=0.3),
        "eps": 1e-5,
        "q_weight": randn(h * d, m, dtype=dtype, generator=generator, scale=scale),
        "k_weight": randn(kv * d, m, dtype=dtype, generator=generator, scale=scale),
        "v_weight": randn(kv * d, m, dtype=dtype, generator=generator, scale=scale),
        "rope": rope_tables(torch.arange(t)[None] + 3 + 2 * torch.arange(b)[:, None], d),
        "k_out": torch.full((b, t, kv, d), torch.nan, dtype=dtype),
        "v_out": torch.full((b, t, kv, d), torch.nan, dtype=dtype),
        "head_dim": d,
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    b, t, m, h, kv, d = (case[name] for name in "BTMHKD")
    outputs = (h + 2 * kv) * d
    return Cost(2.0 * b * t * m * outputs, float(itemsize) * (b * t * m + m * outputs + b * t * outputs))
