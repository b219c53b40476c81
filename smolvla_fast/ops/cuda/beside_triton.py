"""The kernels that serve in the chain of Triton's: each takes the rows that the one ahead prepared, all begin early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import library
from .linear_residual import linear_residual_or_fallback, why_no_clusters
from .norm_qkv_rope import norm_qkv_rope_or_fallback
from .norm_swiglu import norm_swiglu_or_fallback
from .prepared_rows import why_no_norm_products

MEASURED = 9
"""The generation on which linear_residual was measured ahead of Triton's, and Triton's norm_qkv_rope and norm_swiglu far
from what memory allows: an H200, docs/gpu-account.md."""


def beside_triton(device: torch.device) -> dict[str, Callable[..., Callable[..., Any]]]:
    """Of each op that this device has code for: Triton's kernel, which serves other operands -> the op. For a device that
    takes this library's code."""
    found: dict[str, Callable[..., Callable[..., Any]]] = {}
    if why_no_clusters(device) is None:
        found["linear_residual"] = linear_residual_or_fallback
    if why_no_norm_products(device) is None:
        found |= {"norm_qkv_rope": norm_qkv_rope_or_fallback, "norm_swiglu": norm_swiglu_or_fallback}
    return found


def measured(device: torch.device) -> bool:
    """Whether they are the default on a device of ``beside_triton``."""
    return bool(library.properties(device)["compute_capability"] // 10 == MEASURED)
