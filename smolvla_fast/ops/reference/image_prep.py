"""A camera frame to what the vision tower reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Cost

# channels_last: bytes as a camera gives them, [B, h, w, 3]; otherwise floats as a dataset does, [B, 3, h, w].
CASES = (
    dict(B=2, h=480, w=640, height=512, width=512, channels_last=1),
    dict(B=2, h=480, w=640, height=512, width=512, channels_last=0),
    dict(B=1, h=96, w=128, height=512, width=512, channels_last=1),
    dict(B=2, h=33, w=21, height=47, width=64, channels_last=0),
    dict(B=1, h=61, w=87, height=29, width=30, channels_last=1),
    dict(B=1, h=40, w=24, height=40, width=24, channels_last=0),
)


def size_inside(h: int, w: int, height: int, width: int) -> tuple[int, int]:
    """The largest size with the aspect ratio of h x w in height x width, as LeRobot rounds it."""
    if (h, w) == (height, width):
        return h, w
    ratio = max(w / width, h / height)
    return int(h / ratio), int(w / ratio)


def channels_first(frames: Tensor) -> Tensor:
    """Frames [B, 3, h, w], or bytes [B, h, w, 3], as [B, 3, h, w]; 3 rows of bytes are taken as 3 channels.

    raises   ValueError for other shapes
    """
    found = frames
    if frames.ndim == 4 and frames.dtype is torch.uint8 and frames.shape[1] != 3:
        found = frames.permute(0, 3, 1, 2)
    if found.ndim != 4 or found.shape[1] != 3:
        raise ValueError(
            f"image_prep: frames have shape {list(frames.shape)}; accepted is [B, 3, h, w], for uint8 also [B, h, w, 3]"
        )
    return found


def checked_size(frames: Tensor, height: int, width: int) -> tuple[int, int]:
    """``size_inside`` of frames [B, 3, h, w]. Raises ValueError where no pixel is left."""
    h, w = frames.shape[2:]
    found = size_inside(h, w, height, width) if min(h, w, height, width) > 0 else (0, 0)
    if min(found) < 1:
        raise ValueError(
            f"image_prep: a frame of {h}x{w} has no pixel left at {height}x{width}; "
            "accepted are sizes that leave at least one row and one column"
        )
    return found


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
    resized = F.interpolate(
        image, size=size_inside(h, w, height, width), mode="bilinear", align_corners=False
    )
    left, top = max(0, width - resized.shape[3]), max(0, height - resized.shape[2])
    return F.pad(resized, (left, 0, top, 0), value=pad_value)


def as_floats(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """``x / 255`` of bytes [B, 3, h, w] or [B, h, w, 3], as [B, 3, h, w]; 3 rows are taken as 3 channels."""
    # Planes, as frames of floats come: a convolution of oneDNN rounds by the layout of its input on some processors.
    planes = channels_first(frames).to(dtype, memory_format=torch.contiguous_format)
    # By a tensor: a GPU multiplies by the reciprocal of a number, which rounds otherwise.
    return planes / torch.full((), 255.0, dtype=dtype, device=frames.device)


def image_prep(frames: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """``y = 2·pad(resize(x)) - 1``: bilinear, the aspect ratio kept, zeros on the left and on the top before ``2x - 1``.

    frames   [B, 3, h, w] float in [0, 1] or uint8, or [B, h, w, 3] uint8; bytes are read as x/255 in fp32 (in fp64
             where that is asked for); 3 rows of bytes are taken as 3 channels
    dtype    of the result
    returns  [B, 3, height, width], padding and absent pixels -1
    replaces ``resize_with_pad`` and the normalisation in LeRobot's ``prepare_images``, and the scaling of bytes before it
    """
    frames = channels_first(frames)
    if frames.dtype is torch.uint8:
        frames = as_floats(frames, torch.promote_types(dtype, torch.float32))
    return (resize_with_pad(frames, height, width, pad_value=0) * 2.0 - 1.0).to(dtype)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
    b, h, w = (case[name] for name in "Bhw")
    if case["channels_last"]:
        frames = torch.randint(0, 256, (b, h, w, 3), dtype=torch.uint8, generator=generator)
    else:
        frames = torch.rand(b, 3, h, w, dtype=torch.float64, generator=generator).to(torch.float32)
    return {"frames": frames, "height": case["height"], "width": case["width"], "dtype": dtype}


def cost(case: dict[str, int], itemsize: int) -> Cost:
    """Every pixel read once and written once; three blends, and the scaling, of every value written."""
    read = 3.0 * case["B"] * case["h"] * case["w"] * (1 if case["channels_last"] else 4)
    written = 3.0 * case["B"] * case["height"] * case["width"]
    return Cost(flops=11.0 * written, bytes=read + itemsize * written)
