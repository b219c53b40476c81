"""Copies of weights in a dtype that no checkpoint has: made once, checked at every chunk, made anew where a weight changed.

Every other tier reads live weights. A quantised copy cannot, so it carries a fingerprint of what it was made from: sums
over every sixteenth row, a fraction of the bytes. Loading, training, merging and averaging change every row; who edits
a few elements by hand calls ``refresh``.
"""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

from .reference.quantize import Quantized, quantize_rows

EVERY = 16


def fingerprint(weights: list[Tensor]) -> Tensor:
    """[n, 2] fp32: sums of values and of magnitudes over a sample of the rows of each weight."""
    samples = [weight[::EVERY].float() for weight in weights]
    return torch.stack([torch.stack((each.sum(), each.abs().sum())) for each in samples])


class Copies:
    """Quantised copies of one model's matrices.      dtype  of products with them"""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._made: dict[int, tuple[ref[Tensor], int, Quantized]] = {}
        self._fingerprint: Tensor | None = None

    def of(self, weight: Tensor) -> Quantized:
        """The copy of this weight, the same memory at every call, so that a captured graph may read it."""
        found = self._made.get(id(weight))
        if found is None or found[0]() is not weight or found[1] != weight.data_ptr():
            copy = quantize_rows(weight.detach(), self._dtype)
            self._made[id(weight)] = found = (ref(weight), weight.data_ptr(), copy)
            self._fingerprint = None
        return found[2]

    def refreshed(self) -> bool:
        """Make copies anew, in place, if any weight has changed since they were made; whether that was so."""
        weights = self._weights()
        if not weights:
            return False
        now = fingerprint(weights)
        if self._fingerprint is None:  # a copy was just made: what it was made from is what there is
            self._fingerprint = now
            return False
        if torch.equal(now, self._fingerprint):
            return False
        self.refresh()
        return True

    def refresh(self) -> None:
        """Make every copy anew, in place."""
        for weight, _, copy in list(self._made.values()):
            live = weight()
            if live is not None:
                new = quantize_rows(live.detach(), self._dtype)
                copy.data.copy_(new.data)
                copy.scale.copy_(new.scale)
        self._fingerprint = fingerprint(self._weights()) if self._made else None

    def _weights(self) -> list[Tensor]:
        return [live for live in (weight() for weight, _, _ in self._made.values()) if live is not None]

    @property
    def bytes(self) -> int:
        return sum(copy.nbytes for _, _, copy in self._made.values())
