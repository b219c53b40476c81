"""Copies of weights in a dtype that no checkpoint has: made once, checked at every chunk, made anew where a weight changed.

Every other tier reads live weights. A quantised copy cannot, so it carries a fingerprint of what it was made from: sums
over a sixteenth of the rows, a fraction of the bytes. Loading, training, merging and averaging change every row; who edits
a few elements by hand calls ``refresh``.
"""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

from .reference.quantize import Quantized, quantize_rows

EVERY = 16


def fingerprint(weights: list[Tensor]) -> Tensor:
    """[2n] fp32: sums of magnitudes and of squares over the first sixteenth of the rows of each weight."""
    # Leading rows lie side by side, so that a few launches serve all weights.
    samples = [weight[: max(1, len(weight) // EVERY)] for weight in weights]
    norms = [torch._foreach_norm(samples, order, dtype=torch.float32) for order in (1, 2)]
    return torch.stack([each for found in norms for each in found]).nan_to_num()


class Copies:
    """Quantised copies of one model's matrices.      dtype  of products with them"""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._made: dict[int, tuple[ref[Tensor], int, Quantized]] = {}
        self._noted: dict[int, Tensor] = {}

    def of(self, weight: Tensor) -> Quantized:
        """The copy of this weight, the same memory at every call, so that a captured graph may read it."""
        found = self._made.get(id(weight))
        if found is None or found[0]() is not weight or found[1] != weight.data_ptr():
            # Tensors of an inference_mode caller could not be written by a later one outside it.
            with torch.inference_mode(False), torch.no_grad():
                copy = quantize_rows(weight.detach(), self._dtype)
                self._noted[id(weight)] = fingerprint([weight.detach()])
            self._made[id(weight)] = found = (ref(weight), weight.data_ptr(), copy)
        return found[2]

    def refreshed(self) -> bool:
        """Make copies anew, in place, if any weight has changed since they were made; whether that was so."""
        live = self._live()
        if not live:
            return False
        with torch.inference_mode(False), torch.no_grad():
            now = fingerprint([weight for weight, _ in live]).view(2, -1).t()
            noted = torch.stack([self._noted[id(weight)] for weight, _ in live])
            if torch.equal(now, noted):
                return False
        self.refresh()
        return True

    def refresh(self) -> None:
        """Make every copy anew, in place."""
        with torch.inference_mode(False), torch.no_grad():
            for weight, copy in self._live():
                new = quantize_rows(weight.detach(), self._dtype)
                copy.data.copy_(new.data)
                copy.scale.copy_(new.scale)
                self._noted[id(weight)] = fingerprint([weight.detach()])

    def _live(self) -> list[tuple[Tensor, Quantized]]:
        """Weights that are still there, with their copies; those of the others are dropped."""
        self._made = {key: made for key, made in self._made.items() if made[0]() is not None}
        self._noted = {key: noted for key, noted in self._noted.items() if key in self._made}
        pairs = ((weight(), copy) for weight, _, copy in self._made.values())
        return [(weight, copy) for weight, copy in pairs if weight is not None]

    @property
    def bytes(self) -> int:
        return sum(copy.nbytes for _, _, copy in self._made.values())
