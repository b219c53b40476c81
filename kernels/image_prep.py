"""A camera frame to what the vision tower reads: resize, padding and ``2x - 1`` in one pass over the output.

One program a tile of output pixels of one image: it finds the four source pixels of each, blends them for all three
colours and stores once; padding is a value, not a copy. Source positions are computed in fp64 and rounded to fp32, which
is what a fused multiply-add in fp32 gives, so the blending weights have the bits of ``F.interpolate``. The frame is read
once and the result written once: bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import DTYPES, capability
from .dependent_launch import await_inputs, dependent_launch
from .tuning import image_tile


@triton.jit
def _source(target, size, scale):
    """align_corners=False: the two source indices of each target index, and the weight of the second."""
    exact = scale * (target.to(tl.float64) + 0.5) - 0.5
    place = tl.maximum(exact.to(tl.float32), 0.0)
    low = tl.minimum(place.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), place - low.to(tl.float32)


@triton.jit
def _pixels(start, offsets, mask, BYTES: tl.constexpr):
    value = tl.load(start + offsets, mask=mask, other=0).to(tl.float32)
    return tl.div_rn(value, tl.full(value.shape, 255.0, tl.float32)) if BYTES else value


@triton.jit
def _image_prep_fwd(
    frames_ptr,
    out_ptr,
    frame_height,
    frame_width,
    height,
    width,
    left,
    top,
    row_scale,
    col_scale,
    batch_stride,
    channel_stride,
    row_stride,
    col_stride,
    BYTES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    y0, y1, below = _source(row - top, frame_height, row_scale)
    x0, x1, right = _source(col - left, frame_width, col_scale)
    inside = (row < height)[:, None] & (col < width)[None, :]
    filled = inside & (row >= top)[:, None] & (col >= left)[None, :]
    row0, row1 = (y0 * row_stride)[:, None], (y1 * row_stride)[:, None]
    col0, col1 = (x0 * col_stride)[None, :], (x1 * col_stride)[None, :]
    below, right = below[:, None], right[None, :]

    await_inputs(DEPENDENT)
    for channel in tl.static_range(3):
        start = frames_ptr + image * batch_stride + channel * channel_stride
        upper0 = _pixels(start, row0 + col0, filled, BYTES)
        upper1 = _pixels(start, row0 + col1, filled, BYTES)
        lower0 = _pixels(start, row1 + col0, filled, BYTES)
        lower1 = _pixels(start, row1 + col1, filled, BYTES)
        upper = (1.0 - right) * upper0 + right * upper1
        lower = (1.0 - right) * lower0 + right * lower1
        value = (1.0 - below) * upper + below * lower
        value = tl.where(filled, value, 0.0) * 2.0 - 1.0
        plane = out_ptr + (image * 3 + channel) * height * width
        out = plane + row[:, None] * width + col[None, :]
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)


def _in_fp32(number: float) -> float:
    # The interpreter would keep all the digits of a Python float; a GPU gets fp32, as F.interpolate computes in it.
    return float(torch.tensor(number, dtype=torch.float32))


def image_prep(frames: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """``y = 2·pad(resize(x)) - 1``: bilinear, the aspect ratio kept, zeros on the left and on the top before ``2x - 1``.

    frames   [B, 3, h, w] or, bytes only, [B, h, w, 3]; uint8, read as x/255, or fp32 | bf16 | fp16 in [0, 1]; any strides
    dtype    of the result: fp32 | bf16 | fp16
    returns  [B, 3, height, width]
    numerics all in fp32, one rounding
    errors   ValueError for other shapes or dtypes, or a size that leaves no pixel
    replaces ``resize_with_pad`` and the normalisation in LeRobot's ``prepare_images``
    """
    of_bytes = frames.dtype is torch.uint8
    if frames.dtype not in (torch.uint8, *DTYPES) or dtype not in DTYPES:
        raise ValueError(
            f"image_prep: frames are {frames.dtype}, the result {dtype}; accepted are uint8, float32, bfloat16 "
            "and float16, and the last three for the result"
        )
    if frames.ndim == 4 and of_bytes and frames.shape[1] != 3:
        frames = frames.permute(0, 3, 1, 2)
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(
            f"image_prep: frames have shape {list(frames.shape)}; accepted is [B, 3, h, w], for uint8 also [B, h, w, 3]"
        )
    batch, _, frame_height, frame_width = frames.shape
    new_height, new_width = frame_height, frame_width
    if min(height, width) < 1:
        new_height = 0
    elif (frame_height, frame_width) != (height, width):
        ratio = max(frame_width / width, frame_height / height)
        new_height, new_width = int(frame_height / ratio), int(frame_width / ratio)
    if min(new_height, new_width) < 1:
        raise ValueError(
            f"image_prep: a frame of {frame_height}x{frame_width} has no pixel left at {height}x{width}; "
            "accepted are sizes that leave at least one row and one column"
        )
    out = torch.empty(batch, 3, height, width, dtype=dtype, device=frames.device)
    if not out.numel():
        return out
    tile = image_tile(width)
    _image_prep_fwd[(triton.cdiv(width, tile.cols), triton.cdiv(height, tile.rows), batch)](
        frames,
        out,
        frame_height,
        frame_width,
        height,
        width,
        width - new_width,
        height - new_height,
        _in_fp32(frame_height / new_height),
        _in_fp32(frame_width / new_width),
        *frames.stride(),
        BYTES=of_bytes,
        **dependent_launch(capability(frames.device)),
        BLOCK_ROWS=tile.rows,
        BLOCK_COLS=tile.cols,
        num_warps=tile.num_warps,
    )
    return out
