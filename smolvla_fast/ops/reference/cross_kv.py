"""The expert's keys and values for a cross layer: its own projections of the prefix KV, once a chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Cost, randn

CASES = (
    dict(B=1, P=177, K=5, D=64),
    dict(B=2, P=19, K=1, D=16),
)


def cross_kv(
    k: Tensor, v: Tensor, k_weight: Tensor, v_weight: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``k' = k·Wkᵀ,  v' = v·Wvᵀ`` over the joined heads.

    k, v       [B, P, K, D]  the prefix KV of the same layer, already rotated
    weights    [K·D, K·D]  fp32 in LeRobot's default layout, whatever the rest is stored in
    dtype      of the result, the weights' where not given
    returns    k', v'  [B, P, K, D]
    replaces   ``k_proj`` / ``v_proj`` in ``forward_cross_attn_layer``, which stock runs in every denoise step although
               nothing in them depends on the step
    """

    def project(x: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(x.to(weight.dtype).reshape(*x.shape[:2], -1), weight)
        return y.view(*x.shape[:2], -1, x.shape[-1]).to(dtype or weight.dtype)

    return project(k, k_weight), project(v, v_weight)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    b, p, kv, d = (case[name] for name in "BPKD")
    width = kv * d
    return {
        "k": randn(b, p, kv, d, dtype=dtype, generator=generator),
        "v": randn(b, p, kv, d, dtype=dtype, generator=generator),
        "k_weight": randn(width, width, dtype=dtype, generator=generator, scale=width**-0.5),
        "v_weight": randn(width, width, dtype=dtype, generator=generator, scale=width**-0.5),
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    b, p, kv, d = (case[name] for name in "BPKD")
    width = kv * d
    return Cost(4.0 * b * p * width * width, float(itemsize) * (4 * b * p * width + 2 * width * width))
