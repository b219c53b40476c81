"""What of a residual stream stands beside it: a vector that belongs to each of its rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class StreamOffset:
    """The stream is ``x + vector + bias``, where x [..., W] is what memory holds; x may be written where it lies.

    A library adds a product to x in one launch, and cannot add a bias there as well, so it leaves the bias here. The norm
    that reads the stream next adds it. What other ops add to x leaves this as it is.

    vector  [W], or None      bias  [W], left since the last norm, or None
    """

    vector: Tensor | None = None
    bias: Tensor | None = None

    @property
    def terms(self) -> list[Tensor]:
        return [each for each in (self.vector, self.bias) if each is not None]

    def leave(self, bias: Tensor) -> None:
        """To be added by whoever reads the stream."""
        if self.bias is not None:  # no norm came between
            self.vector = self.bias if self.vector is None else self.vector.float() + self.bias
        self.bias = bias

    def added_to(self, x: Tensor) -> Tensor:
        """The stream, for readers that take it whole: in the dtype of x."""
        for each in self.terms:
            x = x + each.to(x.dtype)
        return x
