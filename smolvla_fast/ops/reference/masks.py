"""Who may look at whom: from per-token flags to the [B, T, S] mask of attention."""

from __future__ import annotations

import torch
from torch import Tensor


def block_mask(pad_masks: Tensor, att_masks: Tensor) -> Tensor:
    """A token sees every valid token whose block number is at most its own; ``att_masks`` starts a new block where 1.

    pad_masks  [B, T]  bool, True for real tokens      att_masks  [B, T]  bool or integer
    returns    [B, T, T]  bool
    replaces   ``make_att_2d_masks`` of LeRobot (prefix-LM masks of big_vision)
    """
    blocks = torch.cumsum(att_masks, dim=1)
    visible = blocks[:, None, :] <= blocks[:, :, None]
    return visible & (pad_masks[:, None, :] * pad_masks[:, :, None])
