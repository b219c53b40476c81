"""The attention of one call below ``sample_actions``: which keys and values meet which queries, by LeRobot's rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.products import Products
from ..loss import layers as with_grad
from ..model.kv_cache import LayerKV
from ..model.weights import DecoderLayer, read_decoder_layer
from ..ops.memory import Memory
from ..ops.reference.rope import rope_tables
from ..ops.reference.suffix_tokens import Rope
from ..stages.layers import finish, project
from . import caches
from .notes import CacheNotes, Notebook

Stream = tuple[int, Any, Tensor]
"""0 for the VLM or 1 for the expert, its layer at some depth, and what goes into it, [B, T, M]."""


@dataclass(frozen=True)
class LayerCall:
    """What ``forward`` or one layer of a ``SmolVLMWithExpertModel`` was given.

    inputs        prefix [B, P, M] and suffix [B, S, E]; None where one is left out
    positions     [B, T] integers      mask  [B, T, K] bool
    cache         None where none is used; a dict, ``DynamicCache`` or ``KVCache``
    fill          the cache is to be filled with the prefix
    model_layers  of one layer: the layers of both streams by depth, None where the expert has none      layer  its depth
    """

    inputs: Sequence[Tensor | None]
    positions: Tensor
    mask: Tensor
    cache: Any = None
    fill: bool = False
    model_layers: Any = None
    layer: int = 0


class WeightReader:
    """Reads a layer's weights in the tier's dtype, and projects the expert's cross KV.

    notebook, notes  where converted weights and cross KV are kept for a cache, or None
    """

    def __init__(
        self, products: Products, notebook: Notebook | None = None, notes: CacheNotes | None = None
    ) -> None:
        self.products, self.notes = products, notes
        self._cast, self._cast_cross = products.cast, products.cast_cross_kv
        # Quantised copies are kept and checked by themselves.
        if notebook is not None and notes is not None and products.quantized_weights is None:
            self._cast = partial(self._kept, notebook, products.cast)
            self._cast_cross = partial(self._kept, notebook, products.cast_cross_kv)

    def _kept(self, notebook: Notebook, convert: Any, matrix: Tensor) -> Any:
        if self.products.is_live(matrix):
            return matrix
        return notebook.converted(self.notes, matrix, convert)

    def layer(self, module: Any, cross: bool) -> DecoderLayer:
        return read_decoder_layer(module, cross, self._cast, self._cast_cross)

    def cross_kv(self, cache: Any, depth: int, module: Any) -> LayerKV:
        """The expert's projections of what a cache holds of a layer."""
        weights = module.self_attn.k_proj.weight, module.self_attn.v_proj.weight

        def make() -> LayerKV:
            k, v = (self._cast_cross(each) for each in weights)
            return LayerKV(*self.products.ops.cross_kv(*caches.read(cache, depth), k, v))

        if self.notes is None:
            return make()
        return self.notes.get(("cross", depth), (*caches.held(cache, depth), *weights), make)


class Run:
    """The layers of one call, as LeRobot interleaves them.

    A self-attention layer joins the streams and appends to the cache. In a cross-attention layer the suffix attends to the
    expert's projections of the prefix's keys and values.
    """

    def __init__(
        self, reader: WeightReader, pair: Any, call: LayerCall, cache: Any, memory: Memory | None
    ) -> None:
        self.reader, self.ops, self.call, self.cache = reader, reader.products.ops, call, cache
        self.memory = memory
        self.head_dim = pair.get_vlm_model().text_model.layers[0].self_attn.head_dim
        self.dtypes: dict[int, torch.dtype] = {}  # in which stock has the attention of each stream
        self._ropes: dict[Any, Rope] = {}
        self._masks: dict[Any, Any] = {}

    def rope(self, start: int, stop: int, from_0: bool = False) -> Rope:
        key = (start, stop, from_0)
        if key not in self._ropes:
            positions = self.call.positions[:, start:stop]
            if from_0:
                positions = positions - torch.min(positions, dim=1, keepdim=True).values
            self._ropes[key] = rope_tables(positions, self.head_dim)
        return self._ropes[key]

    def mask(self, rows: slice, keys: int) -> Any:
        key = (rows.start, rows.stop, keys)
        if key not in self._masks:
            self._masks[key] = self.prepare_mask(self.call.mask[:, rows, :keys])
        return self._masks[key]

    def self_attention(self, depth: int, streams: list[Stream]) -> dict[int, Tensor]:
        """All streams attend to all, and to what the cache holds before them."""
        parts, ends = [], [0]
        for _, layer, x in streams:
            ends.append(ends[-1] + x.shape[1])
            parts.append(self.qkv(layer, False, x, self.rope(ends[-2], ends[-1])))
        q, k, v = (torch.cat(p, dim=1) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
        if self.cache is not None:
            k, v = caches.append(self.cache, depth, k, v, self.call.fill)
        attended = self.attention(q, k, v, self.mask(slice(0, ends[-1]), k.shape[1]))
        self.dtypes = dict.fromkeys([i for i, *_ in streams], v.dtype)
        spans = zip(streams, ends, ends[1:], strict=False)
        return {i: attended[:, start:stop] for (i, *_), start, stop in spans}

    def cross_attention(self, depth: int, streams: list[Stream]) -> dict[int, Tensor]:
        """A prefix that is there attends to itself, the suffix to the expert's projections of its keys and values."""
        found: dict[int, Tensor] = {}
        start, kv = 0, None
        for i, layer, x in streams:
            stop = start + x.shape[1]
            if i == 0:
                q, k, v = self.qkv(layer, False, x, self.rope(0, stop))
                found[0], kv = self.attention(q, k, v, self.mask(slice(0, stop), stop)), (k, v)
                self.dtypes[0] = v.dtype
            elif layer is not None:
                k, v = self.cross_kv(depth, layer, kv)
                q, _, _ = self.qkv(layer, True, x, self.rope(start, stop, from_0=True))
                rows = slice(self.call.mask.shape[1] - x.shape[1], self.call.mask.shape[1])
                found[1] = self.attention(q, k, v, self.mask(rows, k.shape[1]))
                self.dtypes[1] = v.dtype
            start = stop
        return found

    def residual(self, x: Tensor) -> Tensor:
        """The residual stream: fp32 but in ``exact``, where stock's own promotions decide."""
        return x if self.reader.products.tier.stock_order else x.float()

    def prepare_mask(self, mask: Tensor) -> Any:
        """In the form that ``attention`` reads."""
        raise NotImplementedError

    def qkv(self, layer: Any, cross: bool, x: Tensor, rope: Rope) -> tuple[Tensor, Any, Any]:
        """q [B, T, H, D], and, but for a cross-attention layer, k and v [B, T, K, D] in the dtype that stock stores."""
        raise NotImplementedError

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        raise NotImplementedError

    def cross_kv(self, depth: int, layer: Any, kv: caches.KV | None) -> caches.KV:
        """The expert's projections of kv, or of what the cache holds where that is None."""
        raise NotImplementedError

    def finish(self, layer: Any, cross: bool, x: Tensor, attended: Tensor, in_place: bool) -> Tensor:
        """What follows the attention of a layer. in_place  x may be written to"""
        raise NotImplementedError


class Fused(Run):
    """By the ops of the tier."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._read: dict[tuple[int, bool], DecoderLayer] = {}

    def _weights(self, layer: Any, cross: bool) -> DecoderLayer:
        """Read once for the attention of a layer and what follows it: a tier may have to convert them."""
        key = (id(layer), cross)
        if key not in self._read:
            self._read[key] = self.reader.layer(layer, cross)
        return self._read[key]

    def prepare_mask(self, mask: Tensor) -> Any:
        return self.ops.prepare_mask(mask)

    def qkv(self, layer: Any, cross: bool, x: Tensor, rope: Rope) -> tuple[Tensor, Any, Any]:
        weights = self._weights(layer, cross)
        if cross:
            return project(self.ops, weights, x, rope, None, self.memory), None, None
        stored = layer.self_attn.k_proj.weight
        shape = (*x.shape[:2], stored.shape[0] // self.head_dim, self.head_dim)
        k, v = (torch.empty(shape, dtype=weights.k.dtype, device=x.device) for _ in range(2))
        q = project(self.ops, weights, x, rope, (k, v), self.memory)
        return q, k.to(stored.dtype), v.to(stored.dtype)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return self.ops.masked_attention(q, k, v, mask, memory=self.memory)

    def cross_kv(self, depth: int, layer: Any, kv: caches.KV | None) -> caches.KV:
        if kv is None:
            found = self.reader.cross_kv(self.cache, depth, layer)
            return found.k, found.v
        weights = self._weights(layer, True)
        return self.ops.cross_kv(*kv, weights.k, weights.v)

    def finish(self, layer: Any, cross: bool, x: Tensor, attended: Tensor, in_place: bool) -> Tensor:
        out, weights = x if in_place else None, self._weights(layer, cross)
        del self._read[id(layer), cross]  # converted weights of one depth alone are held
        return finish(self.ops, weights, x, attended, out, self.memory)


class WithGrad(Run):
    """By the live modules, over one fused attention."""

    def prepare_mask(self, mask: Tensor) -> Any:
        return mask

    def qkv(self, layer: Any, cross: bool, x: Tensor, rope: Rope) -> tuple[Tensor, Any, Any]:
        return with_grad.qkv(layer, x, rope, self.head_dim, keys=not cross)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return with_grad.attention(self.ops, q, k, v, mask)

    def cross_kv(self, depth: int, layer: Any, kv: caches.KV | None) -> caches.KV:
        return with_grad.cross_kv(layer, *(kv or caches.read(self.cache, depth)), self.head_dim)

    def finish(self, layer: Any, cross: bool, x: Tensor, attended: Tensor, in_place: bool) -> Tensor:
        return with_grad.finish(layer, x, attended)
