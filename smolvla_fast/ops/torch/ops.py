"""Backend ``torch``: its functions under the ops' names. The references, which are torch's own calls too, serve the rest."""

# ruff: noqa: F401 - what is imported here is what the backend exports
from .decoder import cross_kv, linear_residual, norm_qkv_rope, norm_swiglu
from .linear import linear
from .masked_attention import attention_with_grad, masked_attention, prepare_mask
from .suffix import euler_step, suffix_embed, suffix_fold
from .vision import layer_norm, patch_embed, pixel_shuffle_linear
