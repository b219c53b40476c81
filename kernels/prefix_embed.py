"""The prefix as the text layers read it: image tokens, language and state joined in one pass over the result.

A program makes some columns of one token, wherever they come from: it scales an image token, looks a token id up, or
projects the state. What is read once and written once bounds the time, and one launch replaces some twenty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, check
from .dependent_launch import await_inputs, dependent_launch
from .tuning import prefix_embed_tile


@triton.jit
def _prefix_embed_fwd(
    image_ptr,
    image_mask_ptr,
    token_ptr,
    token_mask_ptr,
    state_ptr,
    table_ptr,
    weight_ptr,
    bias_ptr,
    start_ptr,
    end_ptr,
    out_ptr,
    pad_ptr,
    att_ptr,
    batch,
    cameras,
    starts,
    image_tokens,
    ends,
    language,
    prefix,
    vocabulary,
    state_width,
    width,
    token_batch_stride,
    token_stride,
    token_mask_batch_stride,
    token_mask_stride,
    state_batch_stride,
    DEPENDENT: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    sample, place = tl.program_id(0) // prefix, tl.program_id(0) % prefix
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_cols = col < width
    camera_tokens = starts + image_tokens + ends
    images = cameras * camera_tokens
    camera, within = place // max(camera_tokens, 1), place % max(camera_tokens, 1) - starts
    scale = tl.sqrt_rn(tl.cast(width, tl.float32))
    await_inputs(DEPENDENT)
    y = tl.zeros([BLOCK_COLS], tl.float32)
    seen = place <= images + language
    if place == images + language:
        products = tl.zeros([BLOCK_COLS, BLOCK_STATE], tl.float32)
        for first in range(0, state_width, BLOCK_STATE):
            i = first + tl.arange(0, BLOCK_STATE)
            in_state = i < state_width
            state = tl.load(state_ptr + sample * state_batch_stride + i, mask=in_state, other=0.0)
            weights = tl.load(
                weight_ptr + col[:, None] * state_width + i[None, :],
                mask=in_cols[:, None] & in_state[None, :],
                other=0.0,
            )
            products += weights.to(tl.float32) * state.to(tl.float32)[None, :]
        y = tl.sum(products, axis=1)
        y += tl.load(bias_ptr + col, mask=in_cols, other=0.0).to(tl.float32)
    elif (place < images) & (within >= 0) & (within < image_tokens):
        seen = tl.load(image_mask_ptr + camera * batch + sample) != 0
        row = ((camera * batch + sample) * image_tokens + within).to(tl.int64) * width
        y = tl.load(image_ptr + row + col, mask=in_cols, other=0.0).to(tl.float32) * scale
    elif place < images + language:
        index = tl.cast(0, tl.int64)
        if place >= images:
            own = place - images
            seen = tl.load(token_mask_ptr + sample * token_mask_batch_stride + own * token_mask_stride) != 0
            index = tl.load(token_ptr + sample * token_batch_stride + own * token_stride).to(tl.int64)
        elif within < 0:
            index = tl.load(start_ptr + within + starts).to(tl.int64)
        else:
            index = tl.load(end_ptr + within - image_tokens).to(tl.int64)
        # An id beyond the table reads nothing and shows.
        known = (index >= 0) & (index < vocabulary)
        y = tl.load(table_ptr + index * width + col, mask=in_cols & known, other=float("nan")).to(tl.float32)
        y = tl.where(place >= images, y * scale, y)
    target = tl.program_id(0).to(tl.int64)
    tl.store(out_ptr + target * width + col, y.to(out_ptr.dtype.element_ty), mask=in_cols)
    if tl.program_id(1) == 0:
        tl.store(pad_ptr + target, seen)
        tl.store(att_ptr + target, place == images + language)


def prefix_embed(
    image_tokens: Tensor | list[Tensor],
    image_masks: Tensor,
    tokens: Tensor,
    token_masks: Tensor,
    state: Tensor,
    table: Tensor,
    projection: tuple[Tensor, Tensor],
    image_ends: tuple[Tensor, Tensor] | None = None,
    length: int = 0,
    dtype: torch.dtype | None = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """``[√M·image tokens of each camera | √M·table[tokens] | state·Wᵀ + b]``, zeros behind it up to ``length``.

    image_tokens [C, B, T, M]  fp32 | bf16 | fp16, contiguous, or an empty list      image_masks  [C, B] bool, contiguous
    tokens       [B, L]  integers, any strides; an id outside the table gives NaN
    token_masks  [B, L]  bool, any strides      state  [B, R]  fp32 | bf16 | fp16
    table        [V, M]      projection  (weight [M, R], bias [M]), these dtypes, contiguous
    image_ends   token ids [n] before and [m] after each camera, whose rows are not scaled, contiguous
    dtype        of the embeddings, fp32 | bf16 | fp16
    returns      embeddings [B, P, M], pad_masks [B, P] bool, att_masks [B, P] bool, True at the state
    numerics     all in fp32, one rounding
    errors       ValueError for other shapes, strides or dtypes
    replaces     ``embed_prefix`` of LeRobot's ``VLAFlowMatching``
    """
    op = "prefix_embed"
    (batch, language), (vocabulary, width) = tokens.shape, table.shape
    weight, bias = projection
    if not isinstance(image_tokens, Tensor):
        if len(image_tokens):
            raise ValueError(f"{op}: image_tokens is a list; accepted is one tensor of all cameras")
        image_tokens = table.new_empty(0, batch, 0, width)
    cameras, each = image_tokens.shape[0], image_tokens.shape[2]
    shapes = {
        "image_tokens": (image_tokens, (cameras, batch, each, width)),
        "state": (state, (batch, weight.shape[1])),
        "table": (table, (vocabulary, width)),
        "projection.weight": (weight, (width, weight.shape[1])),
        "projection.bias": (bias, (width,)),
    }
    for name, (tensor, shape) in shapes.items():
        check(op, name, tensor, shape, like=tokens)
        if name != "state" and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous; call .contiguous() on it")
    starts, ends = (tokens[0, :0], tokens[0, :0]) if image_ends is None else image_ends
    masks = {"image_masks": (image_masks, (cameras, batch)), "token_masks": (token_masks, (batch, language))}
    for name, (mask, shape) in masks.items():
        if mask.dtype is not torch.bool or mask.shape != shape:
            raise ValueError(
                f"{op}: {name} is {mask.dtype}, {list(mask.shape)}; accepted is torch.bool, {list(shape)}"
            )
    for name, ids in (
        ("tokens", tokens),
        ("the first of image_ends", starts),
        ("the last of image_ends", ends),
    ):
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{op}: {name} is {ids.dtype}; accepted are int64 and int32")
    prefix = max(cameras * (len(starts) + each + len(ends)) + language + 1, length)
    device = tokens.device
    out = torch.empty(batch, prefix, width, dtype=dtype, device=device)
    check(op, "the result", out, (batch, prefix, width))
    pad_masks = torch.empty(batch, prefix, dtype=torch.bool, device=device)
    att_masks = torch.empty(batch, prefix, dtype=torch.bool, device=device)
    if not out.numel():
        return out, pad_masks, att_masks
    tile = prefix_embed_tile(weight.shape[1], width)
    _prefix_embed_fwd[(batch * prefix, triton.cdiv(width, tile.cols))](
        image_tokens,
        image_masks.contiguous(),
        tokens,
        token_masks,
        state,
        table,
        weight,
        bias,
        starts,
        ends,
        out,
        pad_masks,
        att_masks,
        batch,
        cameras,
        len(starts),
        each,
        len(ends),
        language,
        prefix,
        vocabulary,
        weight.shape[1],
        width,
        *tokens.stride(),
        *token_masks.stride(),
        state.stride(0),
        **dependent_launch(capability(device)),
        BLOCK_STATE=tile.rows,
        BLOCK_COLS=tile.cols,
        num_warps=tile.num_warps,
    )
    return out, pad_masks, att_masks
