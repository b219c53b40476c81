"""Rotary tables and attention masks of prefix and suffix in one launch, from the masks of the prefix's tokens.

One program a token. It reads the masks of its sample's whole prefix, a few hundred bytes, and needs no prefix sum of its
neighbours: its position is a count of valid tokens, and as blocks only grow along the prefix, it sees what lies before the
next block that starts behind it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability
from .dependent_launch import await_inputs, dependent_launch
from .tuning import row_tile

Table = tuple[Tensor, Tensor]


@triton.jit
def _timescale(index, RATIO: tl.constexpr, BITS: tl.constexpr):
    """RATIO^index, in fp64 by squares, rounded once to fp32."""
    power = tl.full(index.shape, 1.0, tl.float64)
    for bit in tl.static_range(BITS):
        factor = tl.full(index.shape, RATIO ** (2**bit), tl.float64)
        power = tl.where((index >> bit) & 1 == 1, power * factor, power)
    return power.to(tl.float32)


@triton.jit
def _sin_cos(angle):
    """sin and cos of fp32 angles below 10⁶, each to a unit or two in its last place.

    CUDA's own sine can also reduce angles of any size, for which every thread keeps an array in local memory. Here the
    nearest multiple of π/2 is taken off in fp64, and the rest, within π/4, goes through the polynomials of Cephes' sinf.
    """
    turns = angle * 0.6366197723675814
    quarter = (turns + tl.where(turns < 0.0, -0.5, 0.5)).to(tl.int32)
    half_pi = tl.full(angle.shape, 1.5707963267948966, tl.float64)
    x = (angle.to(tl.float64) - quarter.to(tl.float64) * half_pi).to(tl.float32)
    square = x * x
    sin = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * x + x
    cos = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cos = cos * square * square - 0.5 * square + 1.0
    odd = (quarter & 1) == 1
    found_sin, found_cos = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    return (
        tl.where((quarter & 2) == 2, -found_sin, found_sin),
        tl.where(((quarter + 1) & 2) == 2, -found_cos, found_cos),
    )


@triton.jit
def _store_table(sin_ptr, cos_ptr, row, position, timescale, i, half):
    sin, cos = _sin_cos(tl.div_rn(tl.cast(position, tl.float32) + tl.zeros_like(timescale), timescale))
    tl.store(sin_ptr + row * half + i, sin, mask=i < half)
    tl.store(cos_ptr + row * half + i, cos, mask=i < half)


@triton.jit
def _rope_masks_fwd(
    pad_ptr,
    att_ptr,
    sin_ptr,
    cos_ptr,
    mask_ptr,
    own_sin_ptr,
    own_cos_ptr,
    own_mask_ptr,
    cross_sin_ptr,
    cross_cos_ptr,
    prefix,
    suffix,
    half,
    RATIO: tl.constexpr,
    BITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    token, sample = tl.program_id(0), tl.program_id(1)
    key, i = tl.arange(0, BLOCK_KEYS), tl.arange(0, BLOCK_HALF)
    in_prefix = key < prefix
    timescale = _timescale(i, RATIO, BITS)
    await_inputs(DEPENDENT)
    pad = tl.load(pad_ptr + sample * prefix + key, mask=in_prefix, other=0) != 0
    if token < prefix:
        row = sample * prefix + token
        starts = tl.load(att_ptr + sample * prefix + key, mask=in_prefix, other=0) != 0
        block_end = tl.min(tl.where(starts & (key > token), key, prefix), axis=0)
        is_valid = tl.load(pad_ptr + row) != 0
        tl.store(
            mask_ptr + row.to(tl.int64) * prefix + key, pad & (key < block_end) & is_valid, mask=in_prefix
        )
        position = tl.sum((pad & (key <= token)).to(tl.int32), axis=0) - 1
        _store_table(sin_ptr, cos_ptr, row, position, timescale, i, half)
    else:
        place = token - prefix
        row = sample * suffix + place
        own_mask = own_mask_ptr + row.to(tl.int64) * (prefix + suffix)
        tl.store(own_mask + key, pad, mask=in_prefix)
        tl.store(own_mask + prefix + key, key <= place, mask=key < suffix)
        _store_table(
            own_sin_ptr, own_cos_ptr, row, tl.sum(pad.to(tl.int32), axis=0) + place, timescale, i, half
        )
        _store_table(cross_sin_ptr, cross_cos_ptr, row, place, timescale, i, half)


def rope_masks(
    pad_masks: Tensor, att_masks: Tensor, suffix: int, head_dim: int, max_wavelength: float
) -> tuple[tuple[Table, Tensor], tuple[Table, Tensor], tuple[Table, Tensor]]:
    """``p = cumsum(pad) - 1``, ``sin, cos (p / w^(2i/D))``, and who sees whom: ``pad_i · pad_j · (block_j <= block_i)``.

    pad_masks  [B, P]  bool, True for real prefix tokens      att_masks  [B, P]  bool, True starts a new block; contiguous
    suffix     S      head_dim  D, even      max_wavelength  w
    returns    ((sin, cos) [B, T, 1, D/2] fp32, mask [B, T, keys] bool) three times: of the prefix among itself; of the
               suffix that goes on from the prefix's valid tokens and sees them and itself, causally; of the suffix from 0,
               which sees the prefix alone, a view of ``pad_masks``
    numerics   angles in fp32, as they are elsewhere; sine and cosine to a unit or two in the last place
    errors     ValueError for other shapes or dtypes, or more than tuning.MAX_ROW keys
    replaces   ``cumsum``, ``make_att_2d_masks`` and the positions and tables of LeRobot's ``apply_rope``
    """
    batch, prefix = pad_masks.shape
    for name, mask in (("pad_masks", pad_masks), ("att_masks", att_masks)):
        if mask.dtype is not torch.bool or mask.shape != (batch, prefix) or not mask.is_contiguous():
            raise ValueError(
                f"rope_masks: {name} is {mask.dtype}, {list(mask.shape)}; accepted is torch.bool, "
                f"{[batch, prefix]}, contiguous"
            )
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rope_masks: a head size of {head_dim} has no halves; accepted are even sizes")
    half = head_dim // 2

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=pad_masks.device)

    tables = [empty(batch, tokens, 1, half) for tokens in (prefix, prefix, suffix, suffix, suffix, suffix)]
    sin, cos, own_sin, own_cos, cross_sin, cross_cos = tables
    mask = empty(batch, prefix, prefix, dtype=torch.bool)
    own_mask = empty(batch, suffix, prefix + suffix, dtype=torch.bool)
    block = triton.next_power_of_2(half)
    tile = row_tile(max(prefix, suffix, 1))
    if batch and prefix + suffix:
        _rope_masks_fwd[(prefix + suffix, batch)](
            pad_masks,
            att_masks,
            sin,
            cos,
            mask,
            own_sin,
            own_cos,
            own_mask,
            cross_sin,
            cross_cos,
            prefix,
            suffix,
            half,
            RATIO=max_wavelength ** (2.0 / head_dim),
            BITS=int(math.log2(block)),
            **dependent_launch(capability(pad_masks.device)),
            BLOCK_HALF=block,
            BLOCK_KEYS=tile.cols,
            num_warps=tile.num_warps,
        )
    seen = pad_masks[:, None, :].expand(batch, suffix, prefix)
    return ((sin, cos), mask), ((own_sin, own_cos), own_mask), ((cross_sin, cross_cos), seen)
