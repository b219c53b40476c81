"""The ops of text and expert layers over oneDNN linears."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..reference.rope import apply_rope
from .linear import linear
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
    norm_weight: Tensor,
    eps: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    rope: tuple[Tensor, Tensor],
    k_out: Tensor | None,
    v_out: Tensor | None,
    head_dim: int,
    *,
    rms_norm: RMSNorm = plain_rms_norm,
    rotate: Rotate = rotate,
) -> Tensor | None:
    """See ``reference.norm_qkv_rope``."""
    weight = q_weight if q_weight is not None else k_weight
    if weight is None:
        raise ValueError("norm_qkv_rope needs q_weight, or k_weight and v_weight, or all three; got none")
    h = rms_norm(x, norm_weight, eps, weight.dtype)
    heads = (*x.shape[:-1], -1, head_dim)
    if k_weight is not None and v_weight is not None and k_out is not None and v_out is not None:
        rotate(linear(h, k_weight).view(heads), *rope, out=k_out)
        v_out.copy_(linear(h, v_weight).view(heads))
    return None if q_weight is None else rotate(linear(h, q_weight).view(heads), *rope)


def cross_kv(k: Tensor, v: Tensor, k_weight: Tensor, v_weight: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.cross_kv``."""
    return linear(k.flatten(2), k_weight).view(k.shape), linear(v.flatten(2), v_weight).view(v.shape)


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """See ``reference.linear_residual``; returns the dtype of the residual."""
    return linear(x, weight, residual=residual)


def norm_swiglu(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate_weight: Tensor,
    up_weight: Tensor,
    *,
    rms_norm: RMSNorm = plain_rms_norm,
) -> Tensor:
    """See ``reference.norm_swiglu``."""
    h = rms_norm(x, norm_weight, eps, gate_weight.dtype)
    return linear(h, gate_weight, activation="silu").mul_(linear(h, up_weight))
