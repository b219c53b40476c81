"""The ops of text and expert layers over a linear of choice, torch's own where none is named."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..memory import Memory
from ..reference.rope import apply_rope
from .linear import Linear
from .linear import linear as best_linear
from .rms_norm import RMSNorm
from .rms_norm import rms_norm as plain_rms_norm

Rotate = Callable[..., Tensor]
"""x, sin, cos, out -> x rotated, in ``out`` where there is one"""


def rotate(x: Tensor, sin: Tensor, cos: Tensor, out: Tensor | None = None) -> Tensor:
    """See ``reference.rope.apply_rope``."""
    rotated = apply_rope(x, sin, cos)
    return rotated if out is None else out.copy_(rotated)


def norm_qkv_rope(
    x: Tensor,
    norm: tuple[Tensor, float],
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    rope: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor] | None,
    *,
    memory: Memory | None = None,
    linear: Linear = best_linear,
    rms_norm: RMSNorm = plain_rms_norm,
    rotate: Rotate = rotate,
) -> Tensor | None:
    """See ``reference.norm_qkv_rope``."""
    q_weight, k_weight, v_weight = weights
    weight = q_weight if q_weight is not None else k_weight
    if weight is None:
        raise ValueError("norm_qkv_rope needs a weight of q, or of k and v, or all three; got none")
    h = rms_norm(x, *norm, weight.dtype)
    heads = (*x.shape[:-1], -1, 2 * rope[0].shape[-1])
    if slots is not None and k_weight is not None and v_weight is not None:
        rotate(linear(h, k_weight).view(heads), *rope, out=slots[0])
        slots[1].copy_(linear(h, v_weight).view(heads))
    return None if q_weight is None else rotate(linear(h, q_weight).view(heads), *rope)


def cross_kv(
    k: Tensor,
    v: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    dtype: torch.dtype | None = None,
    *,
    linear: Linear = best_linear,
) -> tuple[Tensor, Tensor]:
    """See ``reference.cross_kv``."""
    found = (linear(x.flatten(2), weight).view(x.shape) for x, weight in ((k, k_weight), (v, v_weight)))
    k, v = found if dtype is None else (each.to(dtype) for each in found)
    return k, v


def linear_residual(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    *,
    out: Tensor | None = None,
    memory: Memory | None = None,
    linear: Linear = best_linear,
) -> Tensor:
    """See ``reference.linear_residual``; returns the dtype of the residual."""
    return linear(x, weight, residual=residual)


def norm_swiglu(
    x: Tensor,
    norm: tuple[Tensor, float],
    gate_weight: Tensor,
    up_weight: Tensor,
    *,
    memory: Memory | None = None,
    linear: Linear = best_linear,
    rms_norm: RMSNorm = plain_rms_norm,
) -> Tensor:
    """See ``reference.norm_swiglu``."""
    h = rms_norm(x, *norm, gate_weight.dtype)
    return linear(h, gate_weight, activation="silu").mul_(linear(h, up_weight))
