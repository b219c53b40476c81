"""RMSNorm, the query, key and value projections, rotation, and the write of keys and values into their cache slot."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import Memory
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
    norm: tuple[Tensor, float],
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    rope: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor] | None,
    *,
    memory: Memory | None = None,
) -> Tensor | None:
    """``h = rms_norm(x);  q = rope(h·Wqᵀ);  slots ← rope(h·Wkᵀ), h·Wvᵀ``.

    x        [B, T, M]      norm  (weight [M], eps)
    weights  q [H·D, M] or None (the last text layer leaves only keys and values);
             k, v [K·D, M], or both None (a cross layer of the expert reads keys and values made once a chunk)
    rope     (sin, cos), each [B, T, 1, D/2] fp32: the position offset is in them
    slots    k, v  [B, T, K, D]  views of the cache, written; None where there are no k and v
    memory   see ``ops.memory``
    returns  q [B, T, H, D] in the dtype of its weight, or None
    replaces the first half of ``forward_attn_layer`` / ``forward_cross_attn_layer``
    """
    q_weight, k_weight, v_weight = weights
    h = rms_norm(x, *norm)

    def project(weight: Tensor) -> Tensor:
        return product(matched(h, weight), weight).view(*x.shape[:-1], -1, 2 * rope[0].shape[-1])

    if slots is not None and k_weight is not None and v_weight is not None:
        slots[0].copy_(apply_rope(project(k_weight), *rope))
        slots[1].copy_(project(v_weight))
    return None if q_weight is None else apply_rope(project(q_weight), *rope)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
    b, t, m, h, kv, d = (case[name] for name in "BTMHKD")
    x = randn(b, t, m, dtype=dtype, generator=generator, scale=3.0)
    norm_weight = 1 + randn(m, dtype=dtype, generator=generator, scale=0.3)
    sizes = (h * d, kv * d, kv * d)
    return {
        "x": x,
        "norm": (norm_weight, 1e-5),
        "weights": tuple(randn(o, m, dtype=dtype, generator=generator, scale=m**-0.5) for o in sizes),
        "rope": rope_tables(torch.arange(t)[None] + 3 + 2 * torch.arange(b)[:, None], d),
        "slots": tuple(torch.full((b, t, kv, d), torch.nan, dtype=dtype) for _ in range(2)),
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    b, t, m, h, kv, d = (case[name] for name in "BTMHKD")
    outputs = (h + 2 * kv) * d
    return Cost(2.0 * b * t * m * outputs, float(itemsize) * (b * t * m + m * outputs + b * t * outputs))
