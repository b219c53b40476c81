"""Rows of a matrix in 8 bits with a scale each: floats (e4m3: 4 bits of exponent, 3 of mantissa; arXiv 2209.05433), or
integers (symmetric, dynamic for activations; arXiv 2206.01861). The latter in 16 bits, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class Integers:
    """A kind of integers.

    weights, activations  how they are stored
    zero                  what an activation of 0 is stored as: of bytes, processors multiply one side without a sign
    largest               of either sign, so that zero is exact
    smallest              a row with no magnitude from here up counts as zeros: largest / it would not be an fp32
    """

    weights: torch.dtype
    activations: torch.dtype
    zero: int
    largest: int
    smallest: float


BYTES = Integers(torch.int8, torch.uint8, 128, 127, 2.0**-119)
SUMMED = 192
"""Inputs whose products of ``WORDS`` are added in 32 bits; sums of these are added in fp32."""
WORDS = Integers(torch.int16, torch.int16, 0, 3344, 2.0**-116)
"""As many digits as fit: SUMMED · 3344² is below 2^31."""
KINDS = {kind.activations: kind for kind in (BYTES, WORDS)}
ZERO = BYTES.zero


class IntegerRows(NamedTuple):
    """Activations: ``(data - zero) · scale[:, None]``.   data [..., rows, K] uint8 | int16   scale [..., rows] fp32"""

    data: Tensor
    scale: Tensor

    @property
    def kind(self) -> Integers:
        return KINDS[self.data.dtype]

    @property
    def shape(self) -> torch.Size:
        return self.data.shape


class IntegerWeight(NamedTuple):
    """A weight: ``data · scale[:, None]``.      data  [O, K] int8 | int16      scale  [O] fp32"""

    data: Tensor
    scale: Tensor

    @property
    def kind(self) -> Integers:
        return BYTES if self.data.dtype is torch.int8 else WORDS

    @property
    def operand_dtype(self) -> torch.dtype:
        return self.kind.activations

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of what a product with it gives."""
        return torch.float32


def _round_rows(x: Tensor, kind: Integers) -> tuple[Tensor, Tensor]:
    """Integers as floats, and scales: NaN for a row that is not finite, 0 for one of zeros."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(dim=-1)
    finite, some = largest.isfinite(), largest >= kind.smallest
    # A number over a tensor is its reciprocal times the number to torch: one rounding too many.
    quotient = torch.full_like(largest, kind.largest) / largest
    factor = torch.where(finite & some, quotient, 0.0)
    integers = torch.where((finite & some)[..., None], (wide * factor[..., None]).round(), 0.0)
    scale = torch.where(some, largest / kind.largest, 0.0).masked_fill(~finite, torch.nan)
    return integers, scale


def quantize_activations(x: Tensor, kind: Integers = BYTES) -> IntegerRows:
    """``scale = max|row| / largest;  data = zero + round(row · (largest / max|row|))``, ties to even.

    x        [..., K]  any float dtype
    returns  data [..., K] uint8 | int16, scale [...] fp32 (fp64 for fp64 x). A row without a magnitude of ``kind.smallest``
             counts as zeros: data zero, scale 0. A row with an infinity or a NaN: data zero, scale NaN, so that NaN comes
             of it
    """
    integers, scale = _round_rows(x, kind)
    return IntegerRows((integers + kind.zero).to(kind.activations), scale)


def quantize_weight(weight: Tensor, kind: Integers = BYTES) -> IntegerWeight:
    """The same by output channel, around 0.      weight  [O, K] any float dtype"""
    integers, scale = _round_rows(weight, kind)
    return IntegerWeight(integers.to(kind.weights), scale.float())


def dequantize(x: Quantized | IntegerRows | IntegerWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    zero = x.kind.zero if isinstance(x, IntegerRows) else 0
    return ((x.data.to(dtype) - zero) * x.scale[..., None].to(dtype)).to(dtype)


def operand_dtype(weight: Any) -> torch.dtype:
    """In which dtype a product with this weight takes its other operand; one of ``KINDS`` stands for ``IntegerRows``."""
    return getattr(weight, "operand_dtype", weight.dtype)


def matched(x: Tensor, weight: Tensor | Quantized) -> Tensor:
    """x in the dtype of the weight; beside a quantised weight as it is, for it is rounded once, to 8 bits."""
    return x.to(weight.dtype) if isinstance(weight, Tensor) else x


def product(
    x: Tensor | IntegerRows, weight: Tensor | Quantized | IntegerWeight, bias: Tensor | None = None
) -> Tensor:
    """``x · weightᵀ + bias``, by ``F.linear``; x is quantised by rows where the weight is.

    x        [..., K]; rows of integers where they are there already      weight  [O, K]
    returns  [..., O]; beside a quantised weight in the wider of fp32 and x's dtype
    """
    if isinstance(weight, IntegerWeight):
        rows = x if isinstance(x, IntegerRows) else quantize_activations(x, weight.kind)
        # In fp64 sums of such products are exact up to 8·10^8 terms.
        sums = F.linear(rows.data.double() - rows.kind.zero, weight.data.double())
        y = (sums * weight.scale.double()).to(rows.scale.dtype) * rows.scale[..., None]
        return y if bias is None else y + bias.to(y.dtype)
    assert isinstance(x, Tensor), "rows of integers meet weights of integers"
    if isinstance(weight, Quantized):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.linear(dequantize(quantize_rows(x), wide), dequantize(weight, wide))
        return y if bias is None else y + bias.to(wide)
    return F.linear(x, weight, bias)
