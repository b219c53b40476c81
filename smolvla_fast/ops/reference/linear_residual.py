"""Output projection added onto the residual stream of a text or expert layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import Memory
from . import Cost, randn
from .quantize import matched, product

CASES = (
    dict(rows=177, inputs=960, outputs=960),
    dict(rows=177, inputs=2560, outputs=960),
    dict(rows=50, inputs=960, outputs=720),
    dict(rows=50, inputs=2048, outputs=720),
    dict(rows=5, inputs=33, outputs=47),
)


def linear_residual(
    x: Tensor, weight: Tensor, residual: Tensor, *, out: Tensor | None = None, memory: Memory | None = None
) -> Tensor:
    """``y = residual + x · weightᵀ``.

    x        [..., I]      weight  [O, I]      residual  [..., O]
    out      where the result may go, ``residual`` itself too. A backend may leave it alone: what is returned counts
    memory   where x is rewritten, if it has to be
    returns  [..., O]  dtype of weight: stock adds in place onto the projection's output, so a wider residual stream is
             rounded to the weight's dtype at the first layer
    replaces ``o_proj`` / ``down_proj`` and the in-place add behind them
    """
    y = product(matched(x, weight), weight)
    y += residual
    return y


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    rows, inputs, outputs = case["rows"], case["inputs"], case["outputs"]
    return {
        "x": randn(rows, inputs, dtype=dtype, generator=generator),
        "weight": randn(outputs, inputs, dtype=dtype, generator=generator, scale=inputs**-0.5),
        "residual": randn(rows, outputs, dtype=dtype, generator=generator, scale=3.0),
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    rows, inputs, outputs = case["rows"], case["inputs"], case["outputs"]
    numel = rows * inputs + inputs * outputs + 2 * rows * outputs
    return Cost(2.0 * rows * inputs * outputs, float(itemsize) * numel)
