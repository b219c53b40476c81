"""RMSNorm from the fp32 residual stream straight to the dtype of the next product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RMSNorm = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
"""x, weight, eps, dtype of the result -> normalised x"""


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``weight · x / sqrt(mean(x²) + eps)`` in fp32, rounded once, to ``dtype``."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
    return ((x * scale) * weight).to(dtype)
