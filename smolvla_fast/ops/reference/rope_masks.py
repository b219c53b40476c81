"""All that attention wants to know of the tokens of a chunk beside their values: positions, as rotary tables, and masks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Cost
from .masks import block_mask
from .rope import rope_tables
from .suffix_tokens import Tokens, suffix_tokens

CASES = (
    dict(B=1, P=177, S=50, D=64),
    dict(B=2, P=37, S=7, D=10),
    dict(B=3, P=5, S=40, D=6),
    dict(B=1, P=1, S=1, D=2),
)


def rope_masks(
    pad_masks: Tensor, att_masks: Tensor, suffix: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tokens, Tokens, Tokens]:
    """``p = cumsum(pad) - 1``, tables ``sin, cos (p / w^(2i/D))``, and ``block_mask``; of the suffix as ``suffix_tokens``.

    pad_masks  [B, P]  bool, True for real prefix tokens      att_masks  [B, P]  bool, True starts a new block
    suffix     S      head_dim  D      dtype  of the tables
    returns    ``Tokens`` of the prefix among itself, of the suffix in self-attention and of the suffix in cross-attention
               layers; the last mask may be a view of ``pad_masks``
    replaces   positions and masks of LeRobot's ``sample_actions``, ``denoise_step`` and ``forward_cross_attn_layer``
    """
    positions = torch.cumsum(pad_masks, dim=1) - 1
    prefix = Tokens(rope_tables(positions, head_dim, dtype=dtype), block_mask(pad_masks, att_masks))
    return prefix, *suffix_tokens(pad_masks, suffix, head_dim, dtype)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
    """A sixth of the tokens is padding, the last one starts a block, and of every second sample a few more do.

    dtype  of the tables, at the least fp32
    """
    b, p, s, d = (case[name] for name in "BPSD")
    pad_masks = torch.rand(b, p, generator=generator) > 1 / 6
    att_masks = (torch.rand(b, p, generator=generator) > 0.8) & (torch.arange(b) % 2 == 1)[:, None]
    att_masks[:, -1] = True
    wide = torch.promote_types(dtype, torch.float32)
    return {"pad_masks": pad_masks, "att_masks": att_masks, "suffix": s, "head_dim": d, "dtype": wide}


def cost(case: dict[str, int], itemsize: int) -> Cost:
    b, p, s, d = (case[name] for name in "BPSD")
    tables, masks = b * (p + 2 * s) * d, b * (p * p + s * (p + s))
    return Cost(float(tables + masks), 4.0 * tables + masks + 2 * b * p)
