"""Matrix product with a bias, an activation or a residual at its end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Cost, randn
from .quantize import product

CASES = (
    dict(rows=2048, inputs=768, outputs=768),
    dict(rows=2048, inputs=768, outputs=3072),
    dict(rows=2048, inputs=3072, outputs=768),
    dict(rows=177, inputs=960, outputs=320),
    dict(rows=5, inputs=33, outputs=47),
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``y = residual + act(x · weightᵀ + bias)``.

    x           [..., I]        weight  [O, I], the layout of ``nn.Linear``, or ``Quantized``        bias  [O]
    activation  None | "gelu_tanh" | "silu"        residual  [..., O]
    returns     [..., O]  dtype of weight
    raises      ValueError for another activation
    replaces    the linears of SigLIP with what follows them, the connector's projection, ``state_proj``
    """
    y = product(x, weight, bias)
    if activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif activation == "silu":
        y = F.silu(y)
    elif activation is not None:
        raise ValueError(f"unknown activation {activation!r}; accepted are None, 'gelu_tanh' and 'silu'")
    return y if residual is None else residual + y


def make_inputs(
    case: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor | str | None]:
    rows, inputs, outputs = case["rows"], case["inputs"], case["outputs"]
    return {
        "x": randn(rows, inputs, dtype=dtype, generator=generator),
        "weight": randn(outputs, inputs, dtype=dtype, generator=generator, scale=inputs**-0.5),
        "bias": randn(outputs, dtype=dtype, generator=generator, scale=0.3),
        "activation": "gelu_tanh",
        "residual": None,
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    rows, inputs, outputs = case["rows"], case["inputs"], case["outputs"]
    return Cost(
        flops=2.0 * rows * inputs * outputs,
        bytes=float(itemsize) * (rows * inputs + inputs * outputs + rows * outputs),
    )
