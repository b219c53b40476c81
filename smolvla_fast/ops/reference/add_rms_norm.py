"""Residual add followed by RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Cost, randn
from .rms_norm import rms_norm

CASES = (
    dict(rows=50, width=720),
    dict(rows=177, width=960),
    dict(rows=50, width=480),
    dict(rows=1, width=64),
    dict(rows=7, width=33),
)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``r = x + residual;  y = weight · r / sqrt(mean(r²) + eps)``.

    x, residual  [..., M]  fp32 | bf16 | fp16, equal dtypes; without a residual r is x itself      weight  [M]
    returns      y [..., M] in the dtype x and weight promote to, r [..., M] in the dtype of x
    numerics     mean and scaling in fp32
    replaces     the residual add and ``input_layernorm`` / ``post_attention_layernorm`` of a text or expert layer
    """
    r = x if residual is None else x + residual
    return rms_norm(r, weight, eps), r


def make_inputs(
    case: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor | float]:
    rows, width = case["rows"], case["width"]
    return {
        "x": randn(rows, width, dtype=dtype, generator=generator),
        "residual": randn(rows, width, dtype=dtype, generator=generator, scale=3.0),
        "weight": 1 + randn(width, dtype=dtype, generator=generator, scale=0.3),
        "eps": 1e-5,
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    numel = case["rows"] * case["width"]
    return Cost(flops=5.0 * numel, bytes=float(itemsize) * (4 * numel + case["width"]))
