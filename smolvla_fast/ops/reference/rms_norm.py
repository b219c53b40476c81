"""Root mean square normalisation (arXiv 1910.07467) with the roundings of the Llama layers in SmolVLA."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compute_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``y = weight · x / sqrt(mean(x²) + eps)`` over the last dimension.

    x        [..., M]  any float dtype      weight  [M]
    returns  [..., M]  the dtype that ``weight`` and ``x`` promote to
    numerics mean and scaling in fp32, rounded to the dtype of x *before* the multiplication by weight, as Llama does
    replaces ``input_layernorm`` / ``post_attention_layernorm`` / ``norm`` of text and expert layers
    """
    wide = x.to(compute_dtype(x))
    variance = wide.pow(2).mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(variance + eps)
    return weight * wide.to(x.dtype)
