"""RMSNorm of prepared rows and the gated half of a feed-forward block; csrc/cuda/norm_products.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..next_norm import NextNorm
from . import library
from .prepared_rows import prepared_rows, why_not_prepared


def why_not_norm_swiglu(
    x: Tensor,
    norm: Any,
    gate_weight: Any,
    up_weight: Any,
    *,
    memory: Any = None,
    normed: NextNorm | None = None,
) -> str | None:
    """Why the kernel has no code for these operands, or None."""
    if gate_weight.shape[0] % 2:
        return f"{gate_weight.shape[0]} outputs; accepted are even numbers"
    return why_not_prepared(x, (gate_weight, up_weight), normed)


def norm_swiglu(
    x: Tensor,
    norm: tuple[Tensor, float],
    gate_weight: Any,
    up_weight: Any,
    *,
    memory: Any = None,
    normed: NextNorm | None = None,
) -> Tensor:
    """``h = rms_norm(x);  y = silu(h·Wgᵀ) · (h·Wuᵀ)``.

    x        [..., M]  not read, M a multiple of 8 up to 1024      norm  (weight [M], eps), the weight not read
    weights  gate_weight, up_weight  [F, M]  bf16, F even, rows at multiples of 16 bytes
    memory   not used
    normed   ``ops.next_norm.NextNorm`` of x and this norm, filled in with bf16 rows
    returns  [..., F]  bf16, fresh
    numerics products of bf16 with fp32 sums, 1/rms applied to them, one rounding; parts of K are added in their order, so
             bits are equal in every run; exponential, division and 1/rms by one instruction each
    errors   ValueError for other shapes, strides, dtypes or devices; ``why_not_norm_swiglu`` tells beforehand.
             RuntimeError for a device that does not run it (``why_no_norm_products``), or with CUDA's own words
    replaces ``post_attention_layernorm`` and ``mlp`` up to its ``down_proj``
    """
    op = "norm_swiglu"
    reason = why_not_norm_swiglu(x, norm, gate_weight, up_weight, normed=normed)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")
    outputs, lead = gate_weight.shape[0], x.shape[:-1]
    library.check(op, "up_weight", up_weight, (outputs, x.shape[-1]), (torch.bfloat16,), contiguous=False)
    inputs, sizes, more = prepared_rows(op, x, norm, (gate_weight, up_weight), normed)
    y = torch.empty(*lead, outputs, dtype=torch.bfloat16, device=x.device)
    if y.numel():
        # A launch goes to the device that is current.
        with torch.cuda.device_of(x):
            library.library(x.device).norm_swiglu(
                inputs=[*inputs, library.address(gate_weight), library.address(up_weight)],
                y=library.address(y),
                strides=(gate_weight.stride(0), up_weight.stride(0)),
                sizes=(*sizes, outputs),
                **more,
            )
    return y
