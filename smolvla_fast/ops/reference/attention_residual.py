"""Masked attention with its output projection, added onto the residual stream of a text or expert layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import Memory
from . import Cost, linear_residual, masked_attention, randn

# A self- and a cross-attention layer of a denoise step.
CASES = (
    dict(B=1, T=50, S=227, H=15, K=5, D=64, O=720),
    dict(B=1, T=50, S=177, H=15, K=5, D=64, O=720),
    dict(B=2, T=7, S=19, H=3, K=1, D=16, O=33),
    dict(B=3, T=1, S=33, H=4, K=4, D=8, O=5),
)


def attention_residual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    weight: Tensor,
    residual: Tensor,
    *,
    out: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """``y = residual + masked_attention(q, k, v, mask) · weightᵀ``; both ops as they are.

    q, k, v, mask  as in ``masked_attention``      weight, residual, out  as in ``linear_residual``
    returns        [B, T, O]
    replaces       ``eager_attention_forward``, ``o_proj`` and the in-place add behind them
    """
    attended = masked_attention.masked_attention(q, k, v, mask, memory=memory)
    return linear_residual.linear_residual(attended, weight, residual, out=out, memory=memory)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    given = masked_attention.make_inputs(case, dtype, generator)
    inputs, outputs = case["H"] * case["D"], case["O"]
    return {
        **given,
        "weight": randn(outputs, inputs, dtype=dtype, generator=generator, scale=inputs**-0.5),
        "residual": randn(case["B"], case["T"], outputs, dtype=dtype, generator=generator, scale=3.0),
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    product = dict(rows=case["B"] * case["T"], inputs=case["H"] * case["D"], outputs=case["O"])
    parts = masked_attention.cost(case, itemsize), linear_residual.cost(product, itemsize)
    # What goes from one to the other never reaches memory.
    between = 2.0 * itemsize * product["rows"] * product["inputs"]
    return Cost(sum(each.flops for each in parts), sum(each.bytes for each in parts) - between)
