"""Backend ``triton``: the kernels of ``kernels/`` under the signatures of the ops; every op of a chunk is one launch.

Where torch's call is ahead: ``ops/defaults.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# ruff: noqa: F401 - what is imported here without an underscore is what the backend exports
from ...kernels.attention import attention
from ...kernels.attention_residual import attention_residual
from ...kernels.cross_kv import cross_kv
from ...kernels.euler_step import euler_step
from ...kernels.flow_loss import flow_loss, flow_point
from ...kernels.image_prep import image_prep
from ...kernels.layer_norm import layer_norm
from ...kernels.linear import linear
from ...kernels.linear_residual import linear_residual
from ...kernels.masked_attention import masked_attention
from ...kernels.masked_attention_backward import attention_with_grad
from ...kernels.norm_qkv_rope import norm_qkv_rope
from ...kernels.norm_swiglu import norm_swiglu
from ...kernels.patch_embed import patch_embed
from ...kernels.pixel_shuffle_linear import pixel_shuffle_linear
from ...kernels.prefix_embed import prefix_embed
from ...kernels.rope_masks import rope_masks as _rope_masks
from ...kernels.suffix_embed import suffix_embed
from ...kernels.suffix_fold import suffix_fold as _suffix_fold
from ..reference.ops import prepare_mask
from ..reference.rope import MAX_WAVELENGTH as _MAX_WAVELENGTH
from ..reference.suffix_tokens import Tokens as _Tokens
from ..torch.suffix import Folded as _Folded


def rope_masks(
    pad_masks: Tensor, att_masks: Tensor, suffix: int, head_dim: int, dtype: Any = None
) -> tuple[_Tokens, _Tokens, _Tokens]:
    """See ``reference.rope_masks``; tables are fp32."""
    prefix, own, cross = _rope_masks(pad_masks, att_masks, suffix, head_dim, _MAX_WAVELENGTH)
    return _Tokens(*prefix), _Tokens(*own), _Tokens(*cross)


def suffix_fold(times: Tensor, action_in: tuple[Tensor, Tensor], time_in: tuple[Tensor, Tensor]) -> _Folded:
    """See ``reference.suffix_fold``."""
    return _Folded(*_suffix_fold(times, action_in, time_in))
