"""The layers of a live ``SmolVLMWithExpertModel``, one by one or as a whole, by fused ops on its own weights and LeRobot's own
caches: for whoever samples, analyses or trains below ``sample_actions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.products import Products
from ..loss import layers as modules
from ..model.dims import read_dims, read_pair_dims
from ..model.kv_cache import LayerKV, with_free_slots
from ..model.weights import DecoderLayer, is_cross, read_decoder_layer, read_heads
from ..ops.memory import Memory, Workspace
from ..ops.reference.rope import rope_tables
from ..ops.reference.suffix_tokens import Rope, suffix_tokens
from ..ops.reference.time_embedding import time_embedding
from ..stages.layers import expert_layers, finish, project
from ..stages.vision import encode_images, patch_positions
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


class LayerEngine:
    """Computes layers for one model in one tier, on live weights.

    products  ops and weights of the tier
    What follows from a cache alone, the expert's cross KV, is made once for it and recognised the second time.
    """

    def __init__(self, products: Products) -> None:
        self.products = products
        self._notebook = Notebook()
        self._workspace = Workspace() if products.ops.backend == "cpu" else None
        self._positions: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def after_fork(self) -> None:
        self.products.after_fork()
        self._notebook.renew_lock()

    @property
    def bytes(self) -> int:
        """What is held between calls for caches that are alive, and buffers of a step."""
        return self._notebook.bytes + (0 if self._workspace is None else self._workspace.bytes)

    def embed_image(self, pair: Any, image: Tensor) -> Tensor:
        """[n, 3, side, side] in [-1, 1] -> image tokens [n, tokens, M] in the connector's dtype.

        replaces  ``embed_image`` of LeRobot's ``SmolVLMWithExpertModel``
        """
        vlm, key = pair.get_vlm_model(), None
        with self._on(image):
            dtype = vlm.vision_model.embeddings.patch_embedding.weight.dtype
            key = (image.shape[-1], dtype, image.device)
            if key not in self._positions:
                self._positions[key] = patch_positions(vlm, image)
            if self.products.tier.stock_order:
                image = image.to(dtype)
            out = encode_images(
                self.products.ops, vlm, self.products.cast, read_pair_dims(pair), image, self._positions[key]
            )
            return out.to(vlm.connector.modality_projection.proj.weight.dtype)

    def forward(self, pair: Any, call: LayerCall, forward: Any, grad: bool) -> tuple[list[Any], Any]:
        """All layers and the norms behind them: outputs of both streams, and the cache.

        forward   stock's method: it knows which kind of cache is to be made
        grad      differentiable, through the live modules over one fused attention
        replaces  ``forward`` of LeRobot's ``SmolVLMWithExpertModel``
        """
        stacks = [pair.get_vlm_model().text_model, pair.lm_expert]
        model_layers = pair.get_model_layers(stacks)
        cache = caches.new_cache(forward) if call.fill else call.cache
        suffix = call.inputs[0] is None
        lent = suffix and not grad and self._workspace is not None
        with self._on(call.positions, grad), self._workspace.lent() if lent else nullcontext() as memory:  # type: ignore[union-attr]
            run = self._run(pair, call, cache, grad, memory, notes=suffix)
            streams = [None if x is None else run.widen(x) for x in call.inputs]
            for depth in range(pair.num_vlm_layers):
                present = [(i, model_layers[i][depth], x) for i, x in enumerate(streams) if x is not None]
                if call.fill or not is_cross(pair, depth):
                    attended = run.self_attention(depth, [each for each in present if each[1] is not None])
                else:
                    attended = run.cross_attention(depth, present)
                for i, layer, x in present:
                    if layer is not None:
                        cross = not call.fill and i == 1 and is_cross(pair, depth)
                        streams[i] = run.finish(layer, cross, x, attended[i], in_place=depth > 0)
        outputs = []
        for stack, x in zip(stacks, streams, strict=True):
            if x is None:
                outputs.append(None)
                continue
            dtype = torch.promote_types(stack.norm.weight.dtype, stack.layers[0].mlp.down_proj.weight.dtype)
            outputs.append(stack.norm(x).to(dtype))
        return outputs, cache

    def layer(self, pair: Any, call: LayerCall, cross: bool, grad: bool) -> tuple[list[Tensor | None], Any]:
        """The attention of one layer, up to the output projection: [B, T, H·D] of all streams, or, in a cross-attention
        layer, one of each stream that is computed.

        replaces  ``forward_attn_layer`` and ``forward_cross_attn_layer`` of LeRobot's ``SmolVLMWithExpertModel``
        """
        with self._on(call.positions, grad):
            run = self._run(pair, call, call.cache, grad, None, notes=call.inputs[0] is None)
            given = [
                (i, call.model_layers[i][call.layer], x) for i, x in enumerate(call.inputs) if x is not None
            ]
            streams = [(i, layer, run.widen(x)) for i, layer, x in given]
            if cross:
                found = run.cross_attention(call.layer, streams)
                return [run.typed[i] if i in found else None for i, *_ in streams], call.cache
            run.self_attention(call.layer, [each for each in streams if each[1] is not None])
            return [run.typed[-1]], call.cache

    def denoise_step(self, model: Any, pad_masks: Tensor, cache: Any, x: Tensor, time: Tensor) -> Tensor:
        """The velocity [B, S, A] fp32 of noisy actions x [B, S, A] at time [B]: one step of the denoise stage.

        pad_masks  [B, P] of the prefix      cache  of the prefix; it is left as it was
        replaces   ``denoise_step`` of LeRobot's ``VLAFlowMatching``
        """
        pair, ops, dims, heads = model.vlm_with_expert, self.products.ops, read_dims(model), read_heads(model)
        config = model.config
        with self._on(x):
            self._check_copies()
            kvs, layers = self._prefix(pair, cache, dims.chunk)
            own, cross = suffix_tokens(pad_masks, dims.chunk, dims.head_dim)
            own, cross = (each._replace(mask=ops.prepare_mask(each.mask)) for each in (own, cross))
            times = time_embedding(time, dims.expert_width, config.min_period, config.max_period)
            folded = ops.suffix_fold(times[None], heads.action_in, heads.time_in)
            with nullcontext() if self._workspace is None else self._workspace.lent() as memory:
                h = ops.suffix_embed(x, 0, folded, heads.time_out, memory=memory)
                h = expert_layers(ops, layers, kvs, h, own, cross, memory)
                _, v = ops.euler_step(h, heads.expert_norm, heads.action_out, x, 0.0, None, memory=memory)
                return v if memory is None else v.clone()

    def _prefix(self, pair: Any, cache: Any, chunk: int) -> tuple[list[LayerKV], list[DecoderLayer]]:
        """What the denoise stage reads of a cache: as ``stages.prefix.fill_prefix`` leaves it."""
        notes, by_head = (
            self._notebook.of(cache),
            self.products.tier.stock_order and not isinstance(cache, dict),
        )
        kvs, layers = [], []
        for i, module in enumerate(pair.lm_expert.layers):
            layer = self._record(module, is_cross(pair, i), notes)
            layers.append(layer)
            if layer.cross:
                kvs.append(self._cross_kv(notes, cache, i, module, layer))
                continue

            def with_slots(i: int = i) -> LayerKV:
                k, v = caches.read(cache, i)
                return LayerKV(*(with_free_slots(each, chunk, by_head) for each in (k, v)))

            kvs.append(notes.get(("own", i, chunk), caches.held(cache, i), with_slots))
        return kvs, layers

    def _cross_kv(self, notes: CacheNotes, cache: Any, i: int, module: Any, layer: DecoderLayer) -> LayerKV:
        """The expert's projections of what a cache holds of a layer, made once for it."""
        weights = module.self_attn.k_proj.weight, module.self_attn.v_proj.weight
        ops = self.products.ops

        def make() -> LayerKV:
            return LayerKV(*ops.cross_kv(*caches.read(cache, i), layer.k, layer.v))

        return notes.get(("cross", i), (*caches.held(cache, i), *weights), make)

    def _record(self, module: Any, cross: bool, notes: CacheNotes | None) -> DecoderLayer:
        """A layer's weights as the tier reads them; converted once for a cache."""

        def make() -> DecoderLayer:
            return read_decoder_layer(module, cross, self.products.cast, self.products.widen)

        # Quantised copies are kept and checked by themselves.
        if notes is None or self.products.quantized_weights is not None:
            return make()
        return notes.get(("weights", id(module), cross), tuple(module.parameters()), make)

    def _run(
        self, pair: Any, call: LayerCall, cache: Any, grad: bool, memory: Memory | None, notes: bool
    ) -> _Fused | _WithGrad:
        if grad:
            return _WithGrad(self, pair, call, cache, None, None)
        self._check_copies()
        kept = self._notebook.of(cache) if notes and cache is not None else None
        return _Fused(self, pair, call, cache, memory, kept)

    def _check_copies(self) -> None:
        if self.products.quantized_weights is not None:
            self.products.quantized_weights.checked()

    def _on(self, tensor: Tensor, grad: bool = False) -> Any:
        """Triton launches on the current device, whatever device its tensors are on."""
        device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
        return device if grad else _NoGrad(device)


class _NoGrad:
    """No graph, on a device."""

    def __init__(self, device: Any) -> None:
        self._contexts = device, torch.no_grad()

    def __enter__(self) -> None:
        for each in self._contexts:
            each.__enter__()

    def __exit__(self, *error: Any) -> None:
        for each in reversed(self._contexts):
            each.__exit__(*error)


class _Run:
    """The attention of the layers of one call: which keys and values meet which queries, by LeRobot's rules.

    typed  of the last layer: the attention of each stream that has its own, and under -1 that of all together, in stock's
           dtype
    """

    def __init__(
        self, engine: LayerEngine, pair: Any, call: LayerCall, cache: Any, memory: Memory | None,
        notes: CacheNotes | None,
    ) -> None:  # fmt: skip
        self.engine, self.ops, self.call, self.cache = engine, engine.products.ops, call, cache
        self.memory, self.notes = memory, notes
        self.head_dim = pair.get_vlm_model().text_model.layers[0].self_attn.head_dim
        self.typed: dict[int, Tensor] = {}
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
            k, v = caches.grown(self.cache, depth, k, v, self.call.fill)
        attended = self.attention(q, k, v, self.mask(slice(0, ends[-1]), k.shape[1]))
        self.typed = {-1: attended.to(v.dtype)}
        spans = zip(streams, ends, ends[1:], strict=False)
        return {i: attended[:, start:stop] for (i, *_), start, stop in spans}

    def cross_attention(self, depth: int, streams: list[Stream]) -> dict[int, Tensor]:
        """The prefix, where it is there, attends to itself; the suffix to the expert's projections of its keys and values."""
        found: dict[int, Tensor] = {}
        start, kv = 0, None
        self.typed = {}
        for i, layer, x in streams:
            stop = start + x.shape[1]
            if i == 0:
                q, k, v = self.qkv(layer, False, x, self.rope(0, stop))
                found[0], kv = self.attention(q, k, v, self.mask(slice(0, stop), stop)), (k, v)
                self.typed[0] = found[0].to(v.dtype)
            elif layer is not None:
                k, v = self.cross_kv(depth, layer, kv)
                q, _, _ = self.qkv(layer, True, x, self.rope(start, stop, from_0=True))
                rows = slice(self.call.mask.shape[1] - x.shape[1], self.call.mask.shape[1])
                found[1] = self.attention(q, k, v, self.mask(rows, k.shape[1]))
                self.typed[1] = found[1].to(v.dtype)
            start = stop
        return found

    def prepare_mask(self, mask: Tensor) -> Any:
        raise NotImplementedError

    def qkv(self, layer: Any, cross: bool, x: Tensor, rope: Rope) -> tuple[Tensor, Any, Any]:
        """q [B, T, H, D], and, but for a cross-attention layer, k and v [B, T, K, D] in the dtype that stock stores."""
        raise NotImplementedError

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        raise NotImplementedError

    def cross_kv(self, depth: int, layer: Any, kv: caches.KV | None) -> caches.KV:
        """The expert's projections of kv, or of what the cache holds where that is None."""
        raise NotImplementedError


class _Fused(_Run):
    """By the ops of the tier."""

    def widen(self, x: Tensor) -> Tensor:
        """The residual stream: fp32 but in ``exact``, where stock's own promotions decide."""
        return x if self.engine.products.tier.stock_order else x.float()

    def prepare_mask(self, mask: Tensor) -> Any:
        return self.ops.prepare_mask(mask)

    def _record(self, layer: Any, cross: bool) -> DecoderLayer:
        return self.engine._record(layer, cross, self.notes)

    def qkv(self, layer: Any, cross: bool, x: Tensor, rope: Rope) -> tuple[Tensor, Any, Any]:
        record = self._record(layer, cross)
        if cross:
            return project(self.ops, record, x, rope, None, self.memory), None, None
        stored = layer.self_attn.k_proj.weight
        shape = (*x.shape[:2], stored.shape[0] // self.head_dim, self.head_dim)
        slots = tuple(torch.empty(shape, dtype=record.k.dtype, device=x.device) for _ in range(2))
        q = project(self.ops, record, x, rope, slots, self.memory)
        k, v = (each.to(stored.dtype) for each in slots)
        return q, k, v

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return self.ops.masked_attention(q, k, v, mask, memory=self.memory)

    def cross_kv(self, depth: int, layer: Any, kv: caches.KV | None) -> caches.KV:
        record = self._record(layer, True)
        if kv is not None:
            return self.ops.cross_kv(*kv, record.k, record.v)
        if self.notes is None:
            return self.ops.cross_kv(*caches.read(self.cache, depth), record.k, record.v)
        found = self.engine._cross_kv(self.notes, self.cache, depth, layer, record)
        return found.k, found.v

    def finish(self, layer: Any, cross: bool, x: Tensor, attended: Tensor, in_place: bool) -> Tensor:
        out = x if in_place else None
        return finish(self.ops, self._record(layer, cross), x, attended, out, self.memory)


class _WithGrad(_Run):
    """By the live modules, over one fused attention."""

    def widen(self, x: Tensor) -> Tensor:
        return x.float()

    def prepare_mask(self, mask: Tensor) -> Any:
        return mask

    def qkv(self, layer: Any, cross: bool, x: Tensor, rope: Rope) -> tuple[Tensor, Any, Any]:
        h, attention = modules.normed(layer, x), layer.self_attn
        q = modules.rotate(modules.heads(attention.q_proj, h, self.head_dim), rope)
        if cross:
            return q, None, None
        k = modules.rotate(modules.heads(attention.k_proj, h, self.head_dim), rope)
        return q, k, modules.heads(attention.v_proj, h, self.head_dim)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        # A query that sees nothing weighs all keys alike in stock, and so does a query of zeros that sees all.
        nothing = ~mask.any(-1)[:, :, None, None]
        return self.ops.attention_with_grad(q.masked_fill(nothing, 0), k, v, mask)

    def cross_kv(self, depth: int, layer: Any, kv: caches.KV | None) -> caches.KV:
        return modules.cross_kv(layer, *(kv or caches.read(self.cache, depth)), self.head_dim)

    def finish(self, layer: Any, cross: bool, x: Tensor, attended: Tensor, in_place: bool) -> Tensor:
        return modules.finish(layer, x, attended)
