"""Patch embedding, layer norm and connector of the vision tower with an fp32 residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import Linear
from .linear import linear as best_linear


def patch_embed(
    pixels: Tensor, weight: Tensor, bias: Tensor, position: Tensor, position_ids: Tensor
) -> Tensor:
    """See ``reference.patch_embed``; returns fp32, the dtype of the residual stream."""
    patches = F.conv2d(pixels.to(weight.dtype), weight, bias, stride=weight.shape[2:])
    # Contiguous, for every layer norm and residual addition to come reads it row by row.
    patches = patches.flatten(2).transpose(1, 2).contiguous()
    return patches.float() + F.embedding(position_ids, position).float()


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """See ``reference.layer_norm``; statistics over the fp32 residual stream."""
    y = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return y if dtype is None else y.to(dtype)


def pixel_shuffle_linear(x: Tensor, weight: Tensor, factor: int, *, linear: Linear = best_linear) -> Tensor:
    """See ``reference.pixel_shuffle_linear``."""
    n, tokens, width = x.shape
    small = int(tokens**0.5) // factor
    x = x.to(weight.dtype).reshape(n, small, factor, small, factor * width).permute(0, 1, 3, 2, 4)
    return linear(x.reshape(n, small * small, factor * factor * width), weight)
