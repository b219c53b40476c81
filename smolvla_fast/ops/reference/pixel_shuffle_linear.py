"""The connector: neighbouring patches become one token, projected to the text width."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Cost, randn
from .quantize import product

CASES = (
    dict(N=2, side=32, width=768, factor=4, outputs=960),
    dict(N=3, side=8, width=48, factor=2, outputs=40),
)


def pixel_shuffle_linear(x: Tensor, weight: Tensor, factor: int) -> Tensor:
    """Gather each ``factor × factor`` block of patches into one row, then ``rows · weightᵀ``.

    x        [N, side², W]        weight  [M, W·factor²]
    returns  [N, (side/factor)², M]
    replaces ``SmolVLMConnector`` (pixel shuffle of Idefics3, then ``modality_projection``)
    """
    n, tokens, width = x.shape
    side = int(tokens**0.5)
    small = side // factor
    # Row-major blocks: (block row, row in block, block column, column in block) -> (block row, block column, ...).
    x = x.reshape(n, small, factor, small, factor * width).permute(0, 1, 3, 2, 4)
    return product(x.reshape(n, small * small, factor * factor * width), weight)


def make_inputs(
    case: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor | int]:
    n, side, width, factor, outputs = (case[name] for name in ("N", "side", "width", "factor", "outputs"))
    inputs = width * factor * factor
    return {
        "x": randn(n, side * side, width, dtype=dtype, generator=generator),
        "weight": randn(outputs, inputs, dtype=dtype, generator=generator, scale=inputs**-0.5),
        "factor": factor,
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    n, side, width, factor, outputs = (case[name] for name in ("N", "side", "width", "factor", "outputs"))
    rows, inputs = n * (side // factor) ** 2, width * factor * factor
    return Cost(
        2.0 * rows * inputs * outputs, float(itemsize) * (rows * inputs + inputs * outputs + rows * outputs)
    )
