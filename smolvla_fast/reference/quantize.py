"""Rows of a matrix as 8-bit floats with a scale each (e4m3: 4 bits of exponent, 3 of mantissa; arXiv 2209.05433)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite e4m3."""


class Quantized(NamedTuple):
    """``data · scale[:, None]``.      data  [..., rows, K] e4m3      scale  [..., rows] fp32

    dtype   of what a product with it gives
    """

    data: Tensor
    scale: Tensor
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """``scale = max|row| / 448;  data = round(row / scale)`` to the nearest e4m3, ties to even.

    x        [..., rows, K]  any float dtype; a row of zeros has scale 1      dtype  of products with it
    returns  data [..., rows, K] e4m3, scale [..., rows] fp32: the largest of each row becomes 448
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(dim=-1)
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest)).to(torch.float32)
    return Quantized((wide / scale[..., None]).clamp(-LARGEST, LARGEST).to(E4M3), scale, dtype)


def dequantize(x: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    return (x.data.to(dtype) * x.scale[..., None].to(dtype)).to(dtype)


def matched(x: Tensor, weight: Tensor | Quantized) -> Tensor:
    """x in the dtype of the weight; beside a quantised weight as it is, for it is rounded once, to 8 bits."""
    return x if isinstance(weight, Quantized) else x.to(weight.dtype)


def product(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None) -> Tensor:
    """``x · weightᵀ + bias``, by ``F.linear``; x is quantised by rows where the weight is.

    x        [..., K]      weight  [O, K]
    returns  [..., O]; beside a quantised weight in the wider of fp32 and x's dtype
    """
    if isinstance(weight, Quantized):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.linear(dequantize(quantize_rows(x), wide), dequantize(weight, wide))
        return y if bias is None else y + bias.to(wide)
    return F.linear(x, weight, bias)
