"""The cache that links the prefix to the denoise loop: keys and values, with slots for the suffix behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.reference.suffix_tokens import Tokens


def empty_kv(
    shape: tuple[int, int, int, int], by_head: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Unwritten keys or values of this shape, [B, T, K, D]; ``by_head``: laid out as [B, K, T, D]."""
    batch, tokens, kv_heads, head_dim = shape
    if by_head:
        shape = (batch, kv_heads, tokens, head_dim)
    memory = torch.empty(shape, dtype=dtype, device=device)
    return memory.transpose(1, 2) if by_head else memory


def with_free_slots(x: Tensor, free: int, by_head: bool) -> Tensor:
    """A copy of keys or values [B, T, K, D] with ``free`` unwritten tokens behind them."""
    batch, tokens, kv_heads, head_dim = x.shape
    longer = empty_kv((batch, tokens + free, kv_heads, head_dim), by_head, x.dtype, x.device)
    longer[:, :tokens] = x
    return longer


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
    own, cross  where the suffix stands and what it sees in self-attention and in cross-attention layers
    """

    layers: list[LayerKV]
    pad_masks: Tensor
    own: Tokens
    cross: Tokens
