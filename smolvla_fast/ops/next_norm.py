"""What the op at the end of a residual stream's layer prepares for the norm behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class NextNorm:
    """The stage names the norm; an op that writes the stream fills in the rest, or leaves it alone.

    weight   [M]  of the RMS norm that reads the stream next
    dtype    of the products behind it
    rows     x·weight, rounded to ``dtype``, [..., M]: half the bytes of an fp32 stream, and ready for tensor cores
    squares  [parts, rows] fp32: sums of x² over parts of each row, for 1/rms, which is a factor of the products
    """

    weight: Tensor
    dtype: torch.dtype
    rows: Tensor | None = None
    squares: Tensor | None = None

    @classmethod
    def of(cls, norm: tuple[Tensor, float], weight: Any) -> NextNorm | None:
        """For products with this weight; None where nothing can be prepared: fp16 wants its rows normalised before they are
        rounded, 8 bits their largest value, and fp32 gains nothing."""
        plain = isinstance(weight, Tensor) and weight.dtype is torch.bfloat16
        return cls(norm[0], torch.bfloat16) if plain else None

    def prepared(self, x: Tensor, norm_weight: Tensor, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """(rows [rows, M], squares) of a stream x for this norm and products with this weight, where they were prepared.
        Raises ValueError for another norm or stream."""
        if self.rows is None or self.squares is None or self.rows.dtype is not weight.dtype:
            return None
        if self.weight.data_ptr() != norm_weight.data_ptr():
            raise ValueError("the rows were prepared for another norm")
        if self.rows.shape != x.shape:
            raise ValueError(f"prepared rows have shape {list(self.rows.shape)}; accepted is {list(x.shape)}")
        return self.rows.view(-1, x.shape[-1]), self.squares


HINTS = ("next_norm", "normed", "offset")
"""Keyword arguments of ops: what to prepare, what was prepared, and what stands beside a stream (``stream_offset.py``)."""
