"""Layer normalisation of the vision tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Cost, randn

CASES = (
    dict(rows=2048, width=768),
    dict(rows=1024, width=768),
    dict(rows=5, width=48),
    dict(rows=3, width=31),
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """``y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias`` over the last dimension (arXiv 1607.06450).

    x        [..., W]  fp32 | bf16      weight, bias  [W]
    dtype    of the result, the dtype of the product that reads it; that of x where None, as in stock
    returns  [..., W]
    numerics statistics in fp32
    replaces ``layer_norm1`` / ``layer_norm2`` / ``post_layernorm`` of SigLIP
    """
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y if dtype is None else y.to(dtype)


def make_inputs(
    case: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor | float]:
    rows, width = case["rows"], case["width"]
    return {
        "x": randn(rows, width, dtype=dtype, generator=generator, scale=4.0),
        "weight": 1 + randn(width, dtype=dtype, generator=generator, scale=0.3),
        "bias": randn(width, dtype=dtype, generator=generator, scale=0.3),
        "eps": 1e-6,
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    numel = case["rows"] * case["width"]
    return Cost(flops=8.0 * numel, bytes=float(itemsize) * (2 * numel + 2 * case["width"]))
