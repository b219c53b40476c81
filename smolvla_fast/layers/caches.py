"""The caches that LeRobot hands from layer to layer: transformers' ``DynamicCache`` since 0.6, a dict of tensors before, and
our own ``KVCache``, which is like the first.

Keys and values are [B, T, K, D] here, whatever the cache holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KV = tuple[Tensor, Tensor]


def new_cache(forward: Any) -> Any:
    """An empty cache of the kind that this stock ``forward`` makes."""
    code = forward.__code__
    if "fill_kv_cache" in code.co_varnames[: code.co_argcount]:
        return {}
    names = forward.__globals__
    return names["DynamicCache" if "DynamicCache" in names else "KVCache"]()


def held(cache: Any, layer: int) -> KV:
    """The very tensors that a cache holds of a layer, in its own layout. Raises KeyError, IndexError or AttributeError
    where it holds none."""
    if isinstance(cache, dict):
        found = cache[layer]["key_states"], cache[layer]["value_states"]
    else:
        found = cache.layers[layer].keys, cache.layers[layer].values
    if not all(isinstance(each, Tensor) and each.ndim == 4 for each in found):
        raise AttributeError(f"the cache holds no keys and values of layer {layer}")
    return found


def read(cache: Any, layer: int) -> KV:
    """The keys and values that a cache holds of a layer."""
    k, v = held(cache, layer)
    return (k, v) if isinstance(cache, dict) else (k.transpose(1, 2), v.transpose(1, 2))


def append(cache: Any, layer: int, k: Tensor, v: Tensor, fill: bool) -> KV:
    """Append k, v and return all keys and values that a self-attention layer attends to.

    A ``DynamicCache`` or ``KVCache`` is changed in place, a dict only when ``fill``, with its prefix: as in stock.
    """
    if not isinstance(cache, dict):
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        return k.transpose(1, 2), v.transpose(1, 2)
    if fill:
        cache[layer] = {"key_states": k, "value_states": v}
        return k, v
    before = read(cache, layer)
    return torch.cat([before[0], k], dim=1), torch.cat([before[1], v], dim=1)


def anchor(cache: Any) -> Any:
    """What lives as long as a cache does and can be referred to weakly."""
    return next(iter(cache.values()))["key_states"] if isinstance(cache, dict) else cache
