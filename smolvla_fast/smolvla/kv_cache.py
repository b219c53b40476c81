"""The cache of the prefix's keys and values, filled by the prefill and read by the denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class CachedLayer:
    """keys, values  [B, K, tokens, D]"""

    keys: Tensor
    values: Tensor


class KVCache:
    """One ``CachedLayer`` per VLM layer; the part of transformers' ``DynamicCache`` that SmolVLA uses."""

    def __init__(self) -> None:
        self.layers: list[CachedLayer] = []

    def __len__(self) -> int:
        return len(self.layers)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Appends [B, K, new tokens, D] to a layer, or starts the next one. Returns all its keys and values."""
        if layer_idx == len(self.layers):
            self.layers.append(CachedLayer(keys.contiguous(), values.contiguous()))
        else:
            layer = self.layers[layer_idx]
            layer.keys = torch.cat([layer.keys, keys], dim=-2)
            layer.values = torch.cat([layer.values, values], dim=-2)
        layer = self.layers[layer_idx]
        return layer.keys, layer.values

    def crop(self, length: int) -> None:
        """Keeps the first ``length`` tokens of every layer, dropping those of a denoising step."""
        for layer in self.layers:
            if layer.keys.shape[-2] > length:
                layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
