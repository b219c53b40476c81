"""Backend ``cuda``: the ops that it has kernels for."""

from __future__ import annotations

# ruff: noqa: F401 - what is imported here is what the backend exports
from ..reference.ops import prepare_mask
from .denoise_persistent import denoise_persistent, why_not_persistent
from .euler_step import euler_step
from .image_prep import image_prep
from .linear_residual import linear_residual
from .masked_attention import masked_attention
