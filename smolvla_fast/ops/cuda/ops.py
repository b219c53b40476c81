"""Backend ``cuda``: the ops that it has kernels for. What a kernel does not serve, the backend beside it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .denoise_persistent import denoise_persistent, why_not_persistent
from .euler_step import euler_step
from .image_prep import image_prep
from .masked_attention import masked_attention, why_not_attention

if TYPE_CHECKING:
    from ..table import Ops

__all__ = ["denoise_persistent", "euler_step", "image_prep", "masked_attention_beside", "why_not_persistent"]


def masked_attention_beside(ops: Ops) -> Callable[..., Tensor]:
    """``masked_attention`` on a plain bool mask, by ``ops`` where the kernel has no code for dtypes or head size: queries
    in fp32 are for CUDA cores, where tensor cores have nothing to win."""

    def serve(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        if why_not_attention(q, k, v) is None:
            return masked_attention(q, k, v, mask)
        return ops.masked_attention(q, k, v, ops.prepare_mask(mask))

    return serve
