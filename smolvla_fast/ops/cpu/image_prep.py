"""A camera frame to what the vision tower reads, on a CPU; checked here as in ``kernels.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from ..reference.image_prep import channels_first, checked_size
from .operands import KERNELS, check_one

_FRAMES = {torch.uint8: "uint8", torch.float32: "float32"}


def image_prep(frames: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """``y = 2·pad(resize(x)) - 1``: bilinear, the aspect ratio kept, zeros on the left and on the top before ``2x - 1``.

    frames   [B, 3, h, w] or, bytes only, [B, h, w, 3]; uint8, read as x/255, or fp32 in [0, 1]; any strides; 3 rows of
             bytes are taken as 3 channels
    dtype    of the result: fp32 | bf16
    returns  [B, 3, height, width], fresh
    numerics all in fp32, one rounding; bytes and blending weights have the bits of ``x / 255`` and ``F.interpolate``;
             equal bits at every instruction level and for any number of threads
    errors   as ``kernels.rms_norm``; ValueError for a size that leaves no pixel
    replaces ``resize_with_pad`` and the normalisation in LeRobot's ``prepare_images``, and the scaling of bytes before it
    """
    if frames.dtype not in _FRAMES or dtype not in KERNELS:
        raise TypeError(
            f"image_prep: frames have dtype {frames.dtype}, the result {dtype}; accepted are torch.uint8 and "
            "torch.float32, and for the result torch.float32 and torch.bfloat16"
        )
    frames = channels_first(frames)
    check_one("image_prep", "frames", frames, frames.dtype, "frames", frames.shape)
    batch, _, frame_height, frame_width = frames.shape
    new_height, new_width = checked_size(frames, height, width)
    by_planes, by_pixels = frames.stride(3) == 1, frames.stride(3) == 3 and frames.stride(1) == 1
    if not (by_planes or by_pixels):
        frames = frames.contiguous()
    out = torch.empty(batch, 3, height, width, dtype=dtype, device="cpu")
    if out.numel():
        kernel = getattr(extension.load("cpu"), f"image_prep_{_FRAMES[frames.dtype]}_{KERNELS[dtype]}")
        sizes = (batch, frame_height, frame_width, height, width, new_height, new_width)
        kernel(frames.data_ptr(), out.data_ptr(), sizes, frames.stride(), torch.get_num_threads())
    return out
