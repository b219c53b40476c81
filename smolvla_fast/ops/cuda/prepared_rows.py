"""What the kernels of csrc/cuda/norm_products.cu take in common: rows that were prepared for a norm, and bf16 weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.launch_order import take_may_begin_early
from ..next_norm import NextNorm
from . import library

MOST_INPUTS = 1024
"""As csrc/cuda/norm_products.h has it."""
_ROWS = 64
_MAX_ROWS = 65535 * _ROWS
"""What CUDA accepts as the second extent of a grid, in tiles."""


def why_no_norm_products(device: torch.device) -> str | None:
    """Why a device that takes this library's code does not run the kernels, or None."""
    reason = library.why_no_dependent_launches(device)
    if reason is not None:
        return reason
    kernels, have = library.library(device), library.properties(device)["shared_bytes_per_block"]
    most = kernels.norm_products_shared_bytes()
    if have < most:
        return f"{have} bytes of shared memory for a block; accepted are {most} and more"
    with torch.cuda.device(device if device.type == "cuda" else -1):
        clusters = kernels.norm_products_clusters()
    return (
        None
        if clusters
        else f"no part of this GPU runs eight blocks of {most} bytes of shared memory as a cluster"
    )


def why_not_prepared(x: Tensor, weights: Sequence[Any], normed: NextNorm | None) -> str | None:
    """Why the kernels have no code for a stream x [.., M] and these weights [O, M], or None."""
    for weight in weights:
        if not isinstance(weight, Tensor) or weight.dtype is not torch.bfloat16:
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            return f"a weight is {kind}; accepted is bfloat16"
        if weight.stride(1) != 1 or weight.stride(0) % 8 or weight.data_ptr() % 16:
            return (
                f"a weight has strides {weight.stride()}; accepted are elements of a row side by side, and rows at "
                "multiples of 16 bytes"
            )
    if normed is None or normed.rows is None or normed.rows.dtype is not torch.bfloat16:
        return "no rows of x were prepared in bfloat16; linear_residual prepares them where it is given next_norm"
    inputs = x.shape[-1]
    if inputs % 8 or not 0 < inputs <= MOST_INPUTS:
        return f"{inputs} inputs; accepted are multiples of 8 up to {MOST_INPUTS}"
    if x.shape[:-1].numel() > _MAX_ROWS:
        return f"{x.shape[:-1].numel()} rows; accepted are at most {_MAX_ROWS}"
    return None


def prepared_rows(
    op: str, x: Tensor, norm: tuple[Tensor, float], weights: Sequence[Tensor], normed: NextNorm | None
) -> tuple[list[int], list[int], dict[str, Any]]:
    """Addresses and sizes that both launchers take first, and what they take by name. Raises ValueError."""
    inputs = x.shape[-1]
    library.check(op, "norm.weight", norm[0], (inputs,), like=x)
    for weight in weights:
        library.check(op, "a weight", weight, (weight.shape[0], inputs), like=x, contiguous=False)
    assert normed is not None  # why_not_prepared has asked
    found = normed.prepared(x, norm[0], weights[0])
    assert found is not None
    rows, squares = found
    library.check(op, "normed.rows", rows, (len(rows), inputs), (torch.bfloat16,), like=x, aligned=16)
    library.check(op, "normed.squares", squares, (len(squares), len(rows)), (torch.float32,), like=x)
    more = dict(
        eps=norm[1],
        dependent=take_may_begin_early(),
        # A matrix that is no parameter may be a copy, which a launch of the same chunk makes.
        weights_settled=all(isinstance(weight, nn.Parameter) for weight in weights),
        stream=library.stream(x.device),
    )
    return [library.address(rows), library.address(squares)], [len(rows), inputs, len(squares)], more
