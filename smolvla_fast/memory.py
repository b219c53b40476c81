"""The cache that links the prefix to the denoise loop: keys and values, with room for the suffix behind them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerKV:
    """What one expert layer attends to.

    k, v   [B, P + S, K, D] in a self-attention layer: the prefix KV, then slots that every denoise step overwrites;
           [B, P, K, D] in a cross-attention layer: the expert's projections of the prefix KV, constant over the steps
    """

    k: Tensor
    v: Tensor

    def suffix(self, prefix: int) -> tuple[Tensor, Tensor]:
        """The slots behind the first ``prefix`` tokens."""
        return self.k[:, prefix:], self.v[:, prefix:]


@dataclass(frozen=True)
class PrefixKV:
    """All that the denoise loop needs of an observation.

    layers     one ``LayerKV`` for each expert layer
    pad_masks  [B, P]  bool, True for real prefix tokens
    """

    layers: list[LayerKV]
    pad_masks: Tensor
