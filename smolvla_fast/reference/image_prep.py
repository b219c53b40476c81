"""A camera frame to what the vision tower reads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize_with_pad(image: Tensor, height: int, width: int, pad_value: float) -> Tensor:
    """Bilinear resize that keeps the aspect ratio, padded on the left and on the top.

    image    [B, 3, h, w]  float      returns  [B, 3, height, width]; the input itself if it has that size already
    replaces ``resize_with_pad`` of LeRobot 0.6.1
    """
    if image.ndim != 4:
        raise ValueError(
            f"an image batch [batch, channels, height, width] is expected, got shape {tuple(image.shape)}"
        )
    h, w = image.shape[2:]
    if (h, w) == (height, width):
        return image
    ratio = max(w / width, h / height)
    resized = F.interpolate(
        image, size=(int(h / ratio), int(w / ratio)), mode="bilinear", align_corners=False
    )
    left, top = max(0, width - resized.shape[3]), max(0, height - resized.shape[2])
    return F.pad(resized, (left, 0, top, 0), value=pad_value)
