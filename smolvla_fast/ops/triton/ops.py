"""Backend ``triton``: the kernels of ``kernels/`` under the signatures of the ops, and torch's call where it is ahead.

Every op is one launch, but for matrix products of many rows in fp32: without TF32 these run outside the tensor cores,
where a kernel of ours has nothing to win over the vendor's library.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# ruff: noqa: F401 - what is imported here without an underscore is what the backend exports
from ...kernels.attention import attention
from ...kernels.cross_kv import cross_kv
from ...kernels.euler_step import euler_step
from ...kernels.flow_loss import flow_loss, flow_point
from ...kernels.image_prep import image_prep
from ...kernels.layer_norm import layer_norm
from ...kernels.linear import linear as _linear
from ...kernels.linear_residual import linear_residual as _linear_residual
from ...kernels.masked_attention import masked_attention
from ...kernels.masked_attention_backward import attention_with_grad
from ...kernels.norm_qkv_rope import norm_qkv_rope as _norm_qkv_rope
from ...kernels.norm_swiglu import norm_swiglu as _norm_swiglu
from ...kernels.patch_embed import patch_embed
from ...kernels.pixel_shuffle_linear import pixel_shuffle_linear as _pixel_shuffle_linear
from ...kernels.suffix_embed import suffix_embed
from ..torch import decoder, vision
from ..torch.linear import linear as _torch_linear

single_launch = True
MANY_ROWS = 64
"""Above this many rows an fp32 product goes to torch. The 50 rows of an action chunk stay below."""


def leaves_to_torch(dtype: torch.dtype, rows: int) -> bool:
    """Whether a product of so many rows with a plain weight of this dtype is torch's.

    Not where the caller lets fp32 products run in TF32, which torch then would do and our kernels do not.
    """
    return dtype is torch.float32 and rows > MANY_ROWS and torch.get_float32_matmul_precision() == "highest"


def _torch_serves(x: Tensor, weight: Tensor | None) -> bool:
    """Whether a product is one for torch; quantised weights are for the kernels alone."""
    return isinstance(weight, Tensor) and leaves_to_torch(weight.dtype, x.numel() // x.shape[-1])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See ``reference.linear``."""
    serve = _torch_linear if _torch_serves(x, weight) else _linear
    return serve(x, weight, bias, activation, residual)


def prepare_mask(mask: Tensor) -> Tensor:
    """The kernel reads the bool mask as it is."""
    return mask


def norm_qkv_rope(
    x: Tensor,
    norm: tuple[Tensor, float],
    weights: tuple[Any, Any, Any],
    rope: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor] | None,
    *,
    memory: Any = None,
) -> Tensor | None:
    """See ``reference.norm_qkv_rope``."""
    by_torch = _torch_serves(x, weights[1] if weights[0] is None else weights[0])
    return (decoder.norm_qkv_rope if by_torch else _norm_qkv_rope)(x, norm, weights, rope, slots)


def linear_residual(x: Tensor, weight: Any, residual: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See ``reference.linear_residual``."""
    serve = decoder.linear_residual if _torch_serves(x, weight) else _linear_residual
    return serve(x, weight, residual)


def norm_swiglu(
    x: Tensor, norm: tuple[Tensor, float], gate_weight: Any, up_weight: Any, *, memory: Any = None
) -> Tensor:
    """See ``reference.norm_swiglu``."""
    serve = decoder.norm_swiglu if _torch_serves(x, gate_weight) else _norm_swiglu
    return serve(x, norm, gate_weight, up_weight)


def pixel_shuffle_linear(x: Tensor, weight: Any, factor: int) -> Tensor:
    """See ``reference.pixel_shuffle_linear``."""
    rows = x.shape[0] * x.shape[1] // factor**2
    torch_serves = isinstance(weight, Tensor) and leaves_to_torch(weight.dtype, rows)
    serve = vision.pixel_shuffle_linear if torch_serves else _pixel_shuffle_linear
    return serve(x, weight, factor)
