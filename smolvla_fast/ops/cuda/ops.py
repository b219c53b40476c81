"""Backend ``cuda``: the ops that it has kernels for."""

from __future__ import annotations

from torch import Tensor

# ruff: noqa: F401 - what is imported here is what the backend exports
from .denoise_persistent import denoise_persistent, why_not_persistent
from .euler_step import euler_step
from .image_prep import image_prep
from .linear_residual import linear_residual
from .masked_attention import masked_attention


def prepare_mask(mask: Tensor) -> Tensor:
    """The kernel reads the bool mask as it is."""
    return mask
