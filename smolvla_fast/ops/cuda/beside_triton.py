"""The kernels that serve in the chain of Triton's: each takes the rows that the one ahead prepared, all begin early."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import library
from .linear_residual import linear_residual, why_no_clusters, why_not_few_rows
from .norm_qkv_rope import norm_qkv_rope, why_not_norm_qkv_rope
from .norm_swiglu import norm_swiglu, why_not_norm_swiglu
from .prepared_rows import why_no_norm_products

MEASURED = 9
"""The generation on which linear_residual was measured ahead of Triton's, and Triton's norm_qkv_rope and norm_swiglu far
from what memory allows: an H200, docs/gpu.md. Theirs here were not measured."""


def beside_triton(
    device: torch.device,
) -> tuple[dict[str, Callable[..., Callable[..., Any]]], dict[str, str]]:
    """Of each op that this device has code for: Triton's kernel, which serves other operands -> the op. Of the others, why
    it has none. For a device that takes this library's code; raises RuntimeError in CUDA's own words."""
    no_clusters, no_products = why_no_clusters(device), why_no_norm_products(device)
    kernels: dict[str, tuple[Callable[..., Any], Callable[..., str | None], str | None]] = {
        "linear_residual": (linear_residual, why_not_few_rows, no_clusters),
        "norm_qkv_rope": (norm_qkv_rope, why_not_norm_qkv_rope, no_products),
        "norm_swiglu": (norm_swiglu, why_not_norm_swiglu, no_products),
    }
    found: dict[str, Callable[..., Callable[..., Any]]] = {
        op: partial(library.or_fallback, kernel, why_not)
        for op, (kernel, why_not, reason) in kernels.items()
        if reason is None
    }
    return found, {op: reason for op, (*_, reason) in kernels.items() if reason is not None}


def measured(device: torch.device) -> bool:
    """Whether they are the default on a device of ``beside_triton``."""
    return bool(library.properties(device)["compute_capability"] // 10 == MEASURED)
