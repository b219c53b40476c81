"""Backend ``triton``: the kernels of ``kernels/`` under the signatures of the ops, and torch's call where it is ahead.

Every op is one launch, but for matrix products of many rows in fp32: without TF32 these run outside the tensor cores,
where a kernel of ours has nothing to win over the vendor's library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.linear import linear as linear_kernel
from ...kernels.linear_residual import linear_residual as linear_residual_kernel
from ...kernels.norm_qkv_rope import norm_qkv_rope as norm_qkv_rope_kernel
from ...kernels.norm_swiglu import norm_swiglu as norm_swiglu_kernel
from ...kernels.pixel_shuffle_linear import pixel_shuffle_linear as pixel_shuffle_linear_kernel
from ..torch import decoder, vision
from ..torch import linear as aten

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
    serve = aten.linear if _torch_serves(x, weight) else linear_kernel
    return serve(x, weight, bias, activation, residual)


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """See ``reference.linear_residual``."""
    serve = decoder.linear_residual if _torch_serves(x, weight) else linear_residual_kernel
    return serve(x, weight, residual)


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
) -> Tensor | None:
    """See ``reference.norm_qkv_rope``."""
    by_torch = _torch_serves(x, k_weight if q_weight is None else q_weight)
    serve = decoder.norm_qkv_rope if by_torch else norm_qkv_rope_kernel
    return serve(x, norm_weight, eps, q_weight, k_weight, v_weight, rope, k_out, v_out, head_dim)


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """See ``reference.norm_swiglu``."""
    serve = decoder.norm_swiglu if _torch_serves(x, gate_weight) else norm_swiglu_kernel
    return serve(x, norm_weight, eps, gate_weight, up_weight)


def pixel_shuffle_linear(x: Tensor, weight: Tensor, factor: int) -> Tensor:
    """See ``reference.pixel_shuffle_linear``."""
    rows = x.shape[0] * x.shape[1] // factor**2
    torch_serves = isinstance(weight, Tensor) and leaves_to_torch(weight.dtype, rows)
    serve = vision.pixel_shuffle_linear if torch_serves else pixel_shuffle_linear_kernel
    return serve(x, weight, factor)
