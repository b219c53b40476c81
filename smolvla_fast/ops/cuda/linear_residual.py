"""Output projection and residual add by clusters of blocks that share K; csrc/cuda/linear_residual.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.launch_order import take_may_begin_early
from ..next_norm import NextNorm
from . import library

_STREAMS = (torch.float32, torch.bfloat16)
_BF16 = (torch.bfloat16,)
CLUSTER_ROWS = 256
"""Rows of a chunk and of its prefix: the chunk's an H200 did in half of the time of Triton's kernel (docs/gpu.md), the
prefix's were not measured. Each tile of 64 reads the weight again, which larger tiles do less often."""
# What CUDA accepts as the second extent of a grid, in tiles.
_MAX_ROWS = 65535 * 64


def why_no_clusters(device: torch.device) -> str | None:
    """Why a device that takes this library's code does not run the kernel, or None."""
    reason = library.why_no_dependent_launches(device)
    if reason is None:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            if not library.library(device).linear_residual_clusters():
                reason = "no part of this GPU runs eight blocks as a cluster"
    return reason


def why_not_linear_residual(x: Tensor, weight: Any, residual: Tensor) -> str | None:
    """Why the kernel has no code for these operands, or None."""
    if not isinstance(weight, Tensor) or x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        return f"x is {x.dtype}, weight {kind}; accepted is bfloat16 of both"
    if residual.dtype not in _STREAMS:
        return f"residual is {residual.dtype}; accepted are float32 and bfloat16"
    if weight.shape[1] % 8 or not weight.shape[1]:
        return f"{weight.shape[1]} inputs; accepted are multiples of 8"
    if weight.stride(1) != 1 or weight.stride(0) % 8 or weight.data_ptr() % 16:
        return (
            f"weight has strides {weight.stride()}; accepted are elements of a row side by side, and rows at multiples of "
            "16 bytes"
        )
    return None


def why_not_few_rows(x: Tensor, weight: Any, residual: Tensor, **_: Any) -> str | None:
    """Why another kernel may be ahead of this one, or has to serve, or None."""
    rows = x.shape[:-1].numel()
    too_many = f"{rows} rows; measured were at most {CLUSTER_ROWS}" if rows > CLUSTER_ROWS else None
    return too_many or why_not_linear_residual(x, weight, residual)


def linear_residual(
    x: Tensor,
    weight: Any,
    residual: Tensor,
    *,
    out: Tensor | None = None,
    memory: Any = None,
    next_norm: NextNorm | None = None,
) -> Tensor:
    """``y = residual + x · weightᵀ``.

    x        [..., I]  bf16, I a multiple of 8      weight  [O, I]  bf16      residual  [..., O]  fp32 | bf16
             elements of a row side by side, rows of x and weight at multiples of 16 bytes; other x is copied
    out, memory  not used
    next_norm  ``ops.next_norm.NextNorm``, filled in for the norm that reads y
    returns  [..., O]  dtype of residual, fresh
    numerics products of bf16 with fp32 sums, the residual added in fp32, one rounding; parts of K are added in their order,
             so bits are equal in every run
    errors   ValueError for other shapes, strides, dtypes or devices; ``why_not_linear_residual`` tells beforehand.
             RuntimeError for a device that has no clusters (``why_no_clusters``), or with CUDA's own words
    replaces ``o_proj`` / ``down_proj`` and the in-place add behind them
    """
    reason = why_not_linear_residual(x, weight, residual)
    if reason is not None:
        raise ValueError(f"linear_residual: {reason}")
    outputs, inputs = weight.shape
    lead = x.shape[:-1]
    library.check(
        "linear_residual", "residual", residual, (*lead, outputs), _STREAMS, like=x, contiguous=False
    )
    rows, stream = x.reshape(lead.numel(), x.shape[-1]), residual.reshape(lead.numel(), outputs)
    if rows.stride(1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % 16:
        rows = rows.clone(memory_format=torch.contiguous_format)
    if stream.stride(1) != 1:
        stream = stream.contiguous()
    library.check("linear_residual", "x", rows, (lead.numel(), inputs), _BF16, contiguous=False)
    library.check("linear_residual", "weight", weight, (outputs, inputs), _BF16, like=x, contiguous=False)
    if lead.numel() > _MAX_ROWS:
        raise ValueError(f"linear_residual: x has {lead.numel()} rows; accepted are at most {_MAX_ROWS}")
    kernels = library.library(x.device)
    y = torch.empty(*lead, outputs, dtype=residual.dtype, device=x.device)
    norm_weight = None
    if next_norm is not None:
        norm_weight = next_norm.weight
        library.check("linear_residual", "next_norm.weight", norm_weight, (outputs,), _STREAMS, like=x)
        parts = -(-outputs // kernels.linear_residual_cols)
        next_norm.rows = torch.empty_like(y, dtype=torch.bfloat16)
        next_norm.squares = torch.empty(parts, lead.numel(), dtype=torch.float32, device=x.device)
    if not y.numel():
        return y
    next_norm = next_norm or NextNorm(weight, torch.bfloat16)
    # A launch goes to the device that is current.
    with torch.cuda.device_of(x):
        kernels.linear_residual(
            inputs=[library.address(tensor) for tensor in (rows, weight, stream)],
            y=library.address(y),
            next=[library.address(each) for each in (norm_weight, next_norm.rows, next_norm.squares)],
            fp32=[each is not None and each.dtype is torch.float32 for each in (residual, norm_weight)],
            strides=(rows.stride(0), weight.stride(0), stream.stride(0)),
            sizes=(len(rows), inputs, outputs),
            dependent=take_may_begin_early(),
            # A matrix that is no parameter may be a copy, which a launch of the same chunk makes.
            weight_settled=isinstance(weight, nn.Parameter),
            stream=library.stream(x.device),
        )
    return y
