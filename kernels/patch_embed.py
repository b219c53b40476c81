"""Image to patch tokens: the convolution of stride p as a product whose rows are patches, gathered while they are loaded.

A patch meets each weight once, so the convolution is a product with K = C·p·p; k names channel, row and column of a pixel,
and p neighbouring pixels lie side by side. Pixels are converted to the weight's dtype tile by tile. Bias and the rows of
the position table that ``position_ids`` names are added to the fp32 sum, which is the residual stream and stays fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, check, tile_of
from .dependent_launch import await_inputs, dependent_launch
from .tuning import gemm_tile


@triton.jit
def _patch_embed_fwd(
    pixels_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    ids_ptr,
    y_ptr,
    rows,
    outputs,
    patches,
    patches_across,
    image_stride,
    channel_stride,
    pixel_row_stride,
    position_row_stride,
    ids_image_stride,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    inputs: tl.constexpr = CHANNELS * PATCH * PATCH
    row_tile, col_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N), GROUP_M)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, col < outputs
    image, patch = row // patches, row % patches
    corner = patch // patches_across * PATCH * pixel_row_stride + patch % patches_across * PATCH
    pixel_rows = pixels_ptr + image.to(tl.int64)[:, None] * image_stride + corner[:, None]
    # Columns beyond the last one have its weights, and are never stored.
    weight_cols = weight_ptr + tl.minimum(col, outputs - 1).to(tl.int64)[None, :] * inputs
    await_inputs(DEPENDENT)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_mask = k < inputs
        pixel = k // (PATCH * PATCH) * channel_stride + k // PATCH % PATCH * pixel_row_stride + k % PATCH
        x = tl.load(pixel_rows + pixel[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        w = tl.load(weight_cols + k[:, None], mask=k_mask[:, None] & col_mask[None, :], other=0.0)
        y = tl.dot(x.to(w.dtype), w, y, input_precision="ieee")
    y += tl.load(bias_ptr + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    ids = tl.load(ids_ptr + image * ids_image_stride + patch, mask=row_mask, other=0).to(tl.int64)
    mask = row_mask[:, None] & col_mask[None, :]
    position = tl.load(position_ptr + ids[:, None] * position_row_stride + col[None, :], mask=mask, other=0.0)
    y += position.to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64)[:, None] * outputs + col[None, :], y, mask=mask)


def patch_embed(
    pixels: Tensor, weight: Tensor, bias: Tensor, position: Tensor, position_ids: Tensor
) -> Tensor:
    """``y = conv(pixels) + position[ids]``, one token a patch.

    pixels    [N, C, height, width]      weight  [W, C, p, p]  stride p, contiguous      bias  [W]
    position  [P, W]                     position_ids  [N or 1, T]  int64 or int32, each below P: not checked
              all else any of fp32 | bf16 | fp16, each its own
    returns   [N, T, W]  fp32, the dtype of the residual stream
    errors    ValueError for other shapes or dtypes, a strided last dimension
    replaces  ``SmolVLMVisionEmbeddings``
    """
    images, channels, height, width = pixels.shape
    outputs, patch = weight.shape[0], weight.shape[-1]
    down, across = height // patch, width // patch
    check("patch_embed", "weight", weight, (outputs, channels, patch, patch))
    check("patch_embed", "pixels", pixels, (images, channels, height, width), like=weight)
    check("patch_embed", "bias", bias, (outputs,), like=weight)
    check("patch_embed", "position", position, (position.shape[0], outputs), like=weight)
    if position_ids.shape not in ((images, down * across), (1, down * across)):
        raise ValueError(
            f"patch_embed: position_ids has shape {list(position_ids.shape)}; accepted is [{images} or 1, {down * across}]"
        )
    if position_ids.dtype not in (torch.int64, torch.int32) or position_ids.device != weight.device:
        raise ValueError(
            f"patch_embed: position_ids is {position_ids.dtype} on {position_ids.device}; "
            f"accepted are int64 and int32 on {weight.device}"
        )
    y = torch.empty((images, down * across, outputs), dtype=torch.float32, device=pixels.device)
    if y.numel():
        weight, ids = weight.contiguous(), position_ids.contiguous()
        rows, inputs, cc = images * down * across, channels * patch * patch, capability(y.device)
        # Positions are read at the end, and addresses of pixels kept all along.
        tile = gemm_tile(rows, inputs, outputs, cc, pixels.itemsize, weight.itemsize, residual=True)
        _patch_embed_fwd[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.cols),)](
            pixels,
            weight,
            bias,
            position,
            ids,
            y,
            rows,
            outputs,
            down * across,
            across,
            *pixels.stride()[:3],
            position.stride(0),
            0 if ids.shape[0] == 1 else ids.stride(0),
            CHANNELS=channels,
            PATCH=patch,
            GROUP_M=tile.group,
            **dependent_launch(cc),
            **tile.launch,
        )
    return y
