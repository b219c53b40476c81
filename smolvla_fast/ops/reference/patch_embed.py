"""Image to patch tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Cost, randn

CASES = (
    dict(N=2, side=512, patch=16, width=768),
    dict(N=1, side=512, patch=16, width=768),
    dict(N=3, side=32, patch=4, width=48),
)


def patch_embed(
    pixels: Tensor, weight: Tensor, bias: Tensor, position: Tensor, position_ids: Tensor
) -> Tensor:
    """``y = conv(pixels) + position[ids]``, one token a patch.

    pixels    [N, 3, side, side]        weight  [W, 3, p, p]  stride p        bias  [W]
    position  [patches, W]              position_ids  [N or 1, T]  taken once from the live module (they depend on the
              transformers version and on the dtype)
    returns   [N, T, W]  dtype of weight
    replaces  ``SmolVLMVisionEmbeddings``
    """
    patches = F.conv2d(pixels.to(weight.dtype), weight, bias, stride=weight.shape[2:])
    ids = position_ids.expand(pixels.shape[0], -1)
    return patches.flatten(2).transpose(1, 2) + F.embedding(ids, position)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    n, side, patch, width = (case[name] for name in ("N", "side", "patch", "width"))
    count = (side // patch) ** 2
    return {
        "pixels": randn(n, 3, side, side, dtype=dtype, generator=generator),
        "weight": randn(
            width, 3, patch, patch, dtype=dtype, generator=generator, scale=(3 * patch * patch) ** -0.5
        ),
        "bias": randn(width, dtype=dtype, generator=generator, scale=0.1),
        "position": randn(count, width, dtype=dtype, generator=generator),
        "position_ids": torch.randperm(count, generator=generator)[None],
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    n, side, patch, width = (case[name] for name in ("N", "side", "patch", "width"))
    tokens = (side // patch) ** 2
    inputs = 3 * patch * patch
    return Cost(
        flops=2.0 * n * tokens * inputs * width,
        bytes=float(itemsize) * (n * 3 * side * side + inputs * width + tokens * width + n * tokens * width),
    )
