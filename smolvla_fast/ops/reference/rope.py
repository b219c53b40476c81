"""Rotary position embedding as LeRobot's SmolVLA applies it (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compute_dtype

MAX_WAVELENGTH = 10_000
"""LeRobot rotates with this wavelength whatever the text config's ``rope_theta`` says."""


def rope_tables(
    positions: Tensor, head_dim: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """``sin(p / w^(2i/D)), cos(p / w^(2i/D))`` for every position ``p`` and ``i < D/2``.

    positions  [B, T]  integer, the position of each token (padded tokens take none, so ``cumsum(mask) - 1``)
    dtype      in which angles are computed; fp64 for the truth
    returns    sin, cos  [B, T, 1, D/2]

    Stock rebuilds these 272 times a chunk from three different position tensors; here they are built once each.
    """
    exponents = (2.0 / head_dim) * torch.arange(head_dim // 2, dtype=dtype, device=positions.device)
    timescale = MAX_WAVELENGTH**exponents
    radians = (positions[..., None].to(dtype) / timescale[None, None, :])[..., None, :]
    return torch.sin(radians), torch.cos(radians)


def apply_rope(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the halves of each head: ``[x1·cos - x2·sin, x2·cos + x1·sin]``.

    x         [B, T, H, D]  any float dtype       sin, cos  [B, T, 1, D/2]  fp32
    returns   [B, T, H, D]  contiguous, dtype of x; computed in fp32 and rounded once
    replaces  ``apply_rope`` of LeRobot's ``smolvlm_with_expert``
    """
    half = x.shape[-1] // 2
    wide = x.to(compute_dtype(x))
    x1, x2 = wide.split(half, dim=-1)
    rotated = torch.empty_like(wide)
    rotated[..., :half] = x1 * cos - x2 * sin
    rotated[..., half:] = x2 * cos + x1 * sin
    return rotated.to(x.dtype)
