"""Where the tokens of the suffix stand and what they see: positions, masks and rotation of the expert's attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .masks import block_mask
from .rope import rope_tables

Rope = tuple[Tensor, Tensor]


class Tokens(NamedTuple):
    """Where some tokens stand and what they see.

    rope  sin, cos  [B, T, 1, D/2]  fp32      mask  [B, T, S]  bool
    """

    rope: Rope
    mask: Tensor


def suffix_tokens(
    pad_masks: Tensor, suffix: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tokens, Tokens]:
    """The suffix in a self-attention layer, which sees [prefix | suffix, causal] and whose positions count on from the valid
    tokens of the prefix, and in a cross-attention layer, which sees the prefix alone and whose positions start from 0.

    pad_masks  [B, P]  bool, True for real prefix tokens      suffix  S, tokens of the suffix      dtype  of the tables
    replaces   positions and masks of LeRobot's ``denoise_step``, and those in ``forward_cross_attn_layer``
    """
    batch, prefix = pad_masks.shape
    ones = torch.ones(batch, suffix, dtype=torch.bool, device=pad_masks.device)
    seen = pad_masks[:, None, :].expand(batch, suffix, prefix)
    causal = torch.cat([seen, block_mask(ones, ones)], dim=2)
    place = torch.arange(suffix, device=pad_masks.device).expand(batch, -1)
    offset = torch.sum(pad_masks, dim=-1)[:, None]
    own, cross = (rope_tables(each, head_dim, dtype=dtype) for each in (offset + place, place))
    return Tokens(own, causal), Tokens(cross, seen)
