"""Stage 1: what the policy hands over -> tensors of the shapes the later stages want.

``exact`` leaves everything as stock has it. The other tiers give the language one of a few widths: up to the configured
maximum (so that a CUDA graph serves every prompt), or, on a CPU, where reading a mask costs nothing, down to the longest
prompt and the cameras that are really there. Masked tokens take no part in any result, so neither changes the action
chunk. Frames may be the images that stock's ``prepare_images`` makes, or bytes as a camera gives them: then they go up as
bytes, and resizing and scaling are the first launch of the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.table import Ops

LANGUAGE_MULTIPLE = 16
"""Language widths are multiples of this, so prompts of similar length share shapes."""


class Observation(NamedTuple):
    """frames        one [B, 3, side, side] in [-1, 1] a camera, or raw bytes of any size
    image_masks   [C, B] bool, in tier ``exact`` C of [B]      cameras  C
    tokens        [B, T]  token ids                token_masks  [B, T]  bool
    state         [B, R]
    """

    frames: list[Tensor]
    image_masks: list[Tensor] | Tensor
    tokens: Tensor
    token_masks: Tensor
    state: Tensor


def prepare_observation(
    images: Sequence[Tensor],
    image_masks: Sequence[Tensor],
    tokens: Tensor,
    token_masks: Tensor,
    state: Tensor,
    *,
    stock_order: bool,
    keep_cameras: bool,
    max_language: int,
) -> Observation:
    """Choose cameras and fit the language; see the head of this file.

    images  C of [B, 3, side, side], or bytes      image_masks  C of [B] bool
    tokens, token_masks  [B, T]      state  [B, R]
    """
    images, image_masks = list(images), list(image_masks)
    if stock_order:
        return Observation(images, image_masks, tokens, token_masks, state)
    token_masks = token_masks.to(torch.bool)
    if _trims(state.device):
        # The special tokens around a camera are never masked, so with them even an absent camera has a say.
        present = [i for i, mask in enumerate(image_masks) if keep_cameras or bool(mask.any())]
        images, image_masks = [images[i] for i in present], [image_masks[i] for i in present]
        used = int((token_masks.any(0).nonzero().amax() + 1) if bool(token_masks.any()) else 0)
        width = min(_round_up(used), tokens.shape[1])
    else:
        width = _round_up(max(tokens.shape[1], max_language))
    stacked = torch.stack(image_masks) if image_masks else token_masks.new_empty(0, len(tokens))
    return Observation(images, stacked, _fit(tokens, width), _fit(token_masks, width), state)


def prepare_images(ops: Ops, frames: Sequence[Tensor], side: int, together: bool) -> list[Tensor]:
    """Images of the vision tower's size in groups of equal cameras: one group each, or all in one.

    frames   one a camera, as in ``Observation``
    returns  groups of [n·B, 3, side, side] in [-1, 1], contiguous where in one; else as they lie, for stock's convolution
             computes channels-last frames in another order
    """
    images = [
        ops.image_prep(each, side, side, torch.float32) if each.dtype is torch.uint8 else each
        for each in frames
    ]
    return [torch.cat(images).contiguous()] if together and images else images


def _trims(device: torch.device) -> bool:
    return device.type == "cpu"


def _round_up(width: int) -> int:
    return -(-width // LANGUAGE_MULTIPLE) * LANGUAGE_MULTIPLE


def _fit(x: Tensor, width: int) -> Tensor:
    """Cut or zero-pad the second dimension."""
    have = x.shape[1]
    return x[:, :width] if have >= width else F.pad(x, (0, width - have))
