"""RMSNorm and the gated half of a feed-forward block (GLU variants, arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import Memory
from . import Cost, randn
from .quantize import product
from .rms_norm import rms_norm

CASES = (
    dict(rows=177, inputs=960, outputs=2560),
    dict(rows=50, inputs=720, outputs=2048),
    dict(rows=50, inputs=480, outputs=1280),
    dict(rows=5, inputs=33, outputs=47),
)


def norm_swiglu(
    x: Tensor,
    norm: tuple[Tensor, float],
    gate_weight: Tensor,
    up_weight: Tensor,
    *,
    memory: Memory | None = None,
) -> Tensor:
    """``h = rms_norm(x);  y = silu(h·Wgᵀ) · (h·Wuᵀ)``.

    x        [..., M]      norm  (weight [M], eps)      gate_weight, up_weight  [F, M]
    memory   see ``ops.memory``
    returns  [..., F]  dtype of the weights
    replaces ``post_attention_layernorm`` and ``mlp`` up to its ``down_proj``
    """
    h = rms_norm(x, *norm)
    return F.silu(product(h, gate_weight)) * product(h, up_weight)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
    rows, inputs, outputs = case["rows"], case["inputs"], case["outputs"]
    return {
        "x": randn(rows, inputs, dtype=dtype, generator=generator, scale=3.0),
        "norm": (1 + randn(inputs, dtype=dtype, generator=generator, scale=0.3), 1e-5),
        "gate_weight": randn(outputs, inputs, dtype=dtype, generator=generator, scale=inputs**-0.5),
        "up_weight": randn(outputs, inputs, dtype=dtype, generator=generator, scale=inputs**-0.5),
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    rows, inputs, outputs = case["rows"], case["inputs"], case["outputs"]
    return Cost(
        4.0 * rows * inputs * outputs,
        float(itemsize) * (rows * inputs + 2 * inputs * outputs + rows * outputs),
    )
