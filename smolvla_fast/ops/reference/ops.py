"""The reference implementations under the ops' names: tier ``exact``, and what every backend is tested against."""

# ruff: noqa: F401 - what is imported here is what the backend exports
from __future__ import annotations

from torch import Tensor

from .attention import attention
from .attention_residual import attention_residual
from .cross_kv import cross_kv
from .euler_step import euler_step
from .flow_loss import flow_loss, flow_point
from .image_prep import image_prep
from .layer_norm import layer_norm
from .linear import linear
from .linear_residual import linear_residual
from .masked_attention import masked_attention
from .masked_attention import masked_attention as attention_with_grad
from .norm_qkv_rope import norm_qkv_rope
from .norm_swiglu import norm_swiglu
from .patch_embed import patch_embed
from .pixel_shuffle_linear import pixel_shuffle_linear
from .prefix_embed import prefix_embed
from .rope_masks import rope_masks
from .suffix_embed import suffix_embed, suffix_fold


def prepare_mask(mask: Tensor) -> Tensor:
    """[B, T, S] bool, as it is."""
    return mask
