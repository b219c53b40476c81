"""RMSNorm from the fp32 residual stream straight to the dtype of the next product."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``weight · x / sqrt(mean(x²) + eps)`` in fp32, rounded once, to ``dtype``."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
    return ((x * scale) * weight).to(dtype)
