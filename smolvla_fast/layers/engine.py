"""The layers of a live ``SmolVLMWithExpertModel``, one by one or as a whole, by fused ops on its own weights and LeRobot's
caches: for whoever samples, analyses or trains below ``sample_actions``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..engine.products import Products
from ..model.dims import read_dims, read_pair_dims
from ..model.kv_cache import LayerKV, with_free_slots
from ..model.weights import DecoderLayer, is_cross, read_heads
from ..ops.memory import Memory, Workspace
from ..ops.reference.prefix_embed import prefix_embed
from ..ops.reference.suffix_tokens import suffix_tokens
from ..ops.reference.time_embedding import time_embedding
from ..stages.denoise import suffix_of
from ..stages.layers import embed_suffix, expert_layers
from ..stages.observation import prepare_images
from ..stages.prefix import image_ends
from ..stages.vision import Positions, encode_images, kept_patch_positions
from . import caches
from .notes import Notebook, notebook_of_call
from .run import Fused, LayerCall, Run, WeightReader, WithGrad


class LayerEngine:
    """Computes layers for one model in one tier, on live weights.

    products  ops and weights of the tier
    What follows from a cache alone, the expert's cross KV, is made once for it and recognised the second time.
    """

    def __init__(self, products: Products) -> None:
        self.products = products
        self._notebook = Notebook()
        self._workspace = Workspace() if products.ops.backend == "cpu" else None
        self._positions: Positions = {}

    def after_fork(self) -> None:
        self.products.after_fork()
        self._notebook.renew_lock()

    @property
    def bytes(self) -> int:
        """What is held between calls for caches that are alive, position ids of the patches, and buffers of a step."""
        positions = sum(each.nbytes for each in list(self._positions.values()))
        return self._notebook.bytes + positions + (0 if self._workspace is None else self._workspace.bytes)

    def embed_image(self, pair: Any, image: Tensor) -> Tensor:
        """[n, 3, side, side] in [-1, 1] -> image tokens [n, tokens, M] in the connector's dtype.

        replaces  ``embed_image`` of LeRobot's ``SmolVLMWithExpertModel``
        """
        vlm = pair.get_vlm_model()
        with self._context(image):
            positions = kept_patch_positions(self._positions, vlm, image)
            if self.products.tier.stock_order:
                image = image.to(vlm.vision_model.embeddings.patch_embedding.weight.dtype)
            dims = read_pair_dims(pair)
            out = encode_images(self.products.ops, vlm, self.products.cast, dims, image, positions)
            return out.to(vlm.connector.modality_projection.proj.weight.dtype)

    def embed_prefix(
        self,
        model: Any,
        images: list[Tensor],
        image_masks: list[Tensor],
        tokens: Tensor,
        token_masks: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[images | language | state] of a prefix, its pad masks and its blocks; see ``reference.prefix_embed``.

        replaces  ``embed_prefix`` of LeRobot's ``VLAFlowMatching``
        """
        pair = model.vlm_with_expert
        one_by_one = self.products.tier.stock_order
        side = read_pair_dims(pair).image_side
        with self._context(state):
            groups = prepare_images(self.products.ops, images, side, together=not one_by_one)
        found = [self.embed_image(pair, each) for each in groups]
        if not one_by_one:
            found = list(found[0].split(len(state)))
        with self._context(state):
            return prefix_embed(
                found, image_masks, tokens, token_masks, state,
                pair.get_vlm_model().text_model.get_input_embeddings().weight, read_heads(model).state,
                image_ends(model, state.device), length=model.prefix_length, dtype=None,
            )  # fmt: skip

    def forward(self, pair: Any, call: LayerCall, stock_forward: Any, grad: bool) -> tuple[list[Any], Any]:
        """All layers and the norms behind them: outputs of both streams, and the cache.

        stock_forward  stock's method: it knows which kind of cache is to be made
        grad      differentiable, through the live modules over one fused attention
        replaces  ``forward`` of LeRobot's ``SmolVLMWithExpertModel``
        """
        stacks = [pair.get_vlm_model().text_model, pair.lm_expert]
        model_layers = pair.get_model_layers(stacks)
        cache = caches.new_cache(stock_forward) if call.fill else call.cache
        suffix = call.inputs[0] is None
        lent = suffix and not grad and self._workspace is not None
        with self._context(call.positions, grad), self._workspace.lent() if lent else nullcontext() as memory:  # type: ignore[union-attr]
            run = self._run(pair, call, cache, grad, memory)
            streams = [None if x is None else run.residual(x) for x in call.inputs]
            for depth in range(pair.num_vlm_layers):
                present = [(i, model_layers[i][depth], x) for i, x in enumerate(streams) if x is not None]
                if call.fill or not is_cross(pair, depth):
                    attended = run.self_attention(depth, [each for each in present if each[1] is not None])
                else:
                    attended = run.cross_attention(depth, present)
                for i, layer, x in present:
                    if layer is not None:
                        cross = not call.fill and i == 1 and is_cross(pair, depth)
                        # At depth 0 x is the caller's tensor; every stream has a layer there.
                        streams[i] = run.finish(layer, cross, x, attended[i], in_place=depth > 0)
            outputs = [
                None if x is None else stack.norm(x).to(_stock_dtype(stack))
                for stack, x in zip(stacks, streams, strict=True)
            ]
        return outputs, cache

    def attention_layer(
        self, pair: Any, call: LayerCall, cross: bool, grad: bool
    ) -> tuple[list[Tensor | None], Any]:
        """The attention of one layer, up to the output projection: [B, T, H·D] of all streams, or, in a cross-attention
        layer, one of each stream that is computed.

        replaces  ``forward_attn_layer`` and ``forward_cross_attn_layer`` of LeRobot's ``SmolVLMWithExpertModel``
        """
        with self._context(call.positions, grad):
            run = self._run(pair, call, call.cache, grad)
            given = [
                (i, call.model_layers[i][call.layer], x) for i, x in enumerate(call.inputs) if x is not None
            ]
            streams = [(i, layer, run.residual(x)) for i, layer, x in given]
            if cross:
                found = run.cross_attention(call.layer, streams)
                return [found[i].to(run.dtypes[i]) if i in found else None for i, *_ in streams], call.cache
            found = run.self_attention(call.layer, [each for each in streams if each[1] is not None])
            return [torch.cat(list(found.values()), dim=1).to(run.dtypes[min(found)])], call.cache

    def denoise_step(self, model: Any, pad_masks: Tensor, cache: Any, x: Tensor, time: Tensor) -> Tensor:
        """The velocity [B, S, A] fp32 of noisy actions x [B, S, A] at time [B]: one step of the denoise stage.

        pad_masks  [B, P] of the prefix      cache  of the prefix; it is left as it was
        replaces   ``denoise_step`` of LeRobot's ``VLAFlowMatching``
        """
        pair, ops, dims, heads = model.vlm_with_expert, self.products.ops, read_dims(model), read_heads(model)
        config = model.config
        with self._context(x):
            self._check_copies()
            times = time_embedding(time, dims.expert_width, config.min_period, config.max_period)
            own, cross = suffix_tokens(pad_masks, dims.chunk, dims.head_dim)
            suffix = suffix_of(ops, heads, own, cross, times[None])
            lent = nullcontext() if self._workspace is None else self._workspace.lent()
            with self._kv_and_weights(pair, cache, dims.chunk) as (kvs, layers), lent as memory:
                h, normed = embed_suffix(ops, layers[0], x, 0, suffix.folded, heads.time_out, memory)
                h = expert_layers(ops, layers, kvs, h, suffix.own, suffix.cross, memory, normed)
                # dt = 0: the velocity alone is wanted.
                _, v = ops.euler_step(h, heads.expert_norm, heads.action_out, x, 0.0, None, memory=memory)
                return v if memory is None else v.clone()

    @contextmanager
    def _kv_and_weights(
        self, pair: Any, cache: Any, chunk: int
    ) -> Iterator[tuple[list[LayerKV], list[DecoderLayer]]]:
        """Keys and values of each expert layer, as ``stages.prefix.fill_prefix`` leaves them, and its weights."""
        reader = self._reader(cache)
        notes, kvs, layers = reader.notes, [], []
        assert notes is not None
        # Stock's layout, on which the last bit of a product depends.
        by_head = self.products.tier.stock_order and not isinstance(cache, dict)
        # Slots are written by whoever has them: on a GPU what is queued on one stream is not to meet another's.
        stream = torch.cuda.current_stream().cuda_stream if self.products.device.type == "cuda" else None
        with ExitStack() as stack:
            for i, module in enumerate(pair.lm_expert.layers):
                layers.append(reader.layer(module, is_cross(pair, i)))
                if layers[-1].cross:
                    kvs.append(reader.cross_kv(cache, i, module))
                    continue

                def with_slots(i: int = i) -> LayerKV:
                    return LayerKV(*(with_free_slots(each, chunk, by_head) for each in caches.read(cache, i)))

                kvs.append(
                    stack.enter_context(
                        notes.borrowed(("own", i, chunk, stream), caches.held(cache, i), with_slots)
                    )
                )
            yield kvs, layers

    def _reader(self, cache: Any) -> WeightReader:
        notebook = notebook_of_call(self._notebook)
        return WeightReader(self.products, notebook, notebook.of(cache))

    def _run(self, pair: Any, call: LayerCall, cache: Any, grad: bool, memory: Memory | None = None) -> Run:
        if grad:
            return WithGrad(WeightReader(self.products), pair, call, cache, None)
        self._check_copies()
        # A suffix alone reads a finished cache; one that is being filled changes at every layer.
        known = call.inputs[0] is None and cache is not None
        return Fused(self._reader(cache) if known else WeightReader(self.products), pair, call, cache, memory)

    def _check_copies(self) -> None:
        if self.products.quantized_weights is not None:
            self.products.quantized_weights.checked()

    def _context(self, tensor: Tensor, grad: bool = False) -> ExitStack:
        """No graph unless one is wanted; Triton launches on the current device, whatever device its tensors are on."""
        stack = ExitStack()
        if tensor.is_cuda:
            stack.enter_context(torch.cuda.device(tensor.device))
        if not grad:
            stack.enter_context(torch.no_grad())
        return stack


def _stock_dtype(stack: Any) -> torch.dtype:
    """Of what stock's norm behind a stack gives: its residual stream has the dtype of the last product."""
    return torch.promote_types(stack.norm.weight.dtype, stack.layers[-1].mlp.down_proj.weight.dtype)
