"""A camera frame to what the vision tower reads; csrc/cuda/image_prep.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.image_prep import channels_first, checked_size
from . import library

_FRAMES = (*library.DTYPES, torch.uint8)
# What CUDA accepts as the third extent of a grid.
_MAX_IMAGES = 65535


def image_prep(frames: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """``y = 2·pad(resize(x)) - 1``: bilinear, the aspect ratio kept, zeros on the left and on the top before ``2x - 1``.

    frames   [B, 3, h, w] or, bytes only, [B, h, w, 3]; uint8, read as x/255, or fp32 | bf16 | fp16 in [0, 1]; any strides;
             3 rows of bytes are taken as 3 channels
    dtype    of the result: fp32 | bf16 | fp16
    returns  [B, 3, height, width], fresh
    numerics all in fp32, one rounding; bytes and blending weights have the bits of ``x / 255`` and ``F.interpolate``
    errors   ValueError for other shapes or dtypes, a size that leaves no pixel, or more than 65535 images;
             RuntimeError for a device that is no NVIDIA GPU, or with CUDA's own words
    replaces ``resize_with_pad`` and the normalisation in LeRobot's ``prepare_images``
    """
    if frames.dtype not in _FRAMES or dtype not in library.DTYPES:
        raise ValueError(
            f"image_prep: frames are {frames.dtype}, the result {dtype}; accepted are uint8, float32, bfloat16 "
            "and float16, and the last three for the result"
        )
    frames = channels_first(frames)
    batch, _, frame_height, frame_width = frames.shape
    if batch > _MAX_IMAGES:
        raise ValueError(f"image_prep: {batch} images; at most {_MAX_IMAGES} are accepted, split them")
    new_height, new_width = checked_size(frames, height, width)
    kernels = library.library(frames.device)
    out = torch.empty(batch, 3, height, width, dtype=dtype, device=frames.device)
    if not out.numel():
        return out
    # A launch goes to the device that is current.
    with torch.cuda.device_of(frames):
        kernels.image_prep(
            frames=library.address(frames),
            frames_dtype=_FRAMES.index(frames.dtype),
            strides=frames.stride(),
            out=library.address(out),
            out_dtype=_FRAMES.index(dtype),
            frames_size=(batch, frame_height, frame_width),
            size=(height, width),
            padding=(width - new_width, height - new_height),
            scales=(frame_height / new_height, frame_width / new_width),
            stream=library.stream(frames.device),
        )
    return out
