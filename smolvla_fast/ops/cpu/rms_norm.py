"""RMSNorm from the fp32 residual stream to the dtype of the next product, by the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See ``torch.rms_norm``: rounded once, to ``dtype``."""
    return kernels.rms_norm(x.contiguous(), weight.to(x.dtype).contiguous(), eps).to(dtype)
