"""A training step's forward: observation -> prefix KV without a graph -> state -> expert -> flow loss.

What is frozen is computed once without a graph by the engine's ops. By default that is everything but the expert, the heads
and one token: images and language do not see the state, so of the whole prefix only the state's own row depends on a
parameter that learns. Where more learns, more is differentiated, down to the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..model.dims import Dims, read_dims
from ..model.precision import Tier
from ..model.weights import is_cross
from ..ops.processor import why_bf16_is_slow
from ..ops.reference.masks import block_mask
from ..ops.reference.prefix_embed import join_prefix
from ..ops.reference.rope import rope_tables
from ..ops.reference.suffix_tokens import suffix_tokens
from ..ops.select import select
from ..stages.observation import Observation, prepare_images, prepare_observation
from ..stages.prefix import image_ends, text_kv
from ..stages.vision import Positions, encode_images, encode_patches, kept_patch_positions
from .image_cache import ImageCache
from .layers import Rows, expert_layers, text_layers

Prefix = Iterator[tuple[Tensor, Tensor]]
"""Keys and values [B, P, K, D] of each text layer, rotated."""


class LossEngine:
    """Computes training losses for one model in one tier. Weights are read from the model at each call, and what holds for
    one call alone is handed down as an argument: threads with and without autocast may share an engine.

    fallback_reasons  what the tier does without, with the reasons: as the last look and the last loss had it
    cache             of image tokens, or None
    keeps_tokens      whether the caller keeps image tokens by ``encode``: then, too, there is a receipt where they cannot be
    """

    def __init__(
        self, tier: Tier, backend: str, device: torch.device, cache: ImageCache | None = None
    ) -> None:
        self.tier = tier
        self.ops = select(backend, device, False, None)
        self.cache = cache
        self.keeps_tokens = False
        self.fallback_reasons: dict[str, str] = {}
        self.not_frozen: str | None = None
        self._slow_bf16 = why_bf16_is_slow() if device.type == "cpu" else None
        self._positions: Positions = {}

    def look(self, model: Any, not_frozen: str | None) -> None:
        """Note, once for each state of a model, why the engine's ops cannot replace its frozen modules, or None."""
        self.not_frozen = not_frozen
        instead = f"{self.not_frozen}; the modules themselves compute it"
        self._note("frozen prefix", None if self.not_frozen is None else instead)
        self._no_cache(model)

    def _note(self, what: str, reason: str | None) -> None:
        """A receipt goes when its cause does."""
        if reason is None:
            self.fallback_reasons.pop(what, None)
        else:
            self.fallback_reasons[what] = reason

    def _no_cache(self, model: Any) -> str | None:
        """Why image tokens cannot be kept, or None. Without gradients too: weights that learn move."""
        vlm, reason = model.vlm_with_expert.get_vlm_model(), None
        if any(each.requires_grad for each in (*vlm.vision_model.parameters(), *vlm.connector.parameters())):
            reason = "vision tower or connector learn; tokens are made at every step"
        elif self.not_frozen is not None:
            reason = f"{self.not_frozen}; the modules themselves make the tokens, at every step"
        self._note("image cache", reason if self.keeps_tokens or self.cache is not None else None)
        return reason

    def after_fork(self) -> None:
        if self.cache is not None:
            self.cache.renew_lock()

    def encode(self, model: Any, images: Tensor) -> Tensor:
        """Image tokens that ``losses`` takes in place of images, of a frozen vision tower. One by one: the order of a
        product's sums depends on how many rows it has, and tokens must not depend on which frames are beside them.

        images    [n, 3, side, side] in [-1, 1]
        returns   [n, tokens, M] without a graph, in the dtype that this thread multiplies in now
        replaces  ``embed_image`` of LeRobot's ``SmolVLMWithExpertModel``
        """
        one = partial(self._encoded, model, read_dims(model), self._products(images.device.type))
        with _frozen(images.device):
            return torch.cat([one(image) for image in images.split(1)])

    def losses(
        self,
        model: Any,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        tokens: Tensor,
        token_masks: Tensor,
        state: Tensor,
        actions: Tensor,
        noise: Tensor,
        time: Tensor,
    ) -> Tensor:
        """Squared error of the velocity, ``(noise - actions - v(x_t))²`` at ``x_t = t·noise + (1 - t)·actions``.

        model     a ``VLAFlowMatching``, LeRobot's or ours
        images    C of [B, 3, side, side] in [-1, 1], or C of [B, tokens, M] as ``encode`` makes them
        tokens    [B, T] token ids      token_masks  [B, T] bool      state  [B, R]      image_masks  C of [B] bool
        actions   [B, S, A] fp32      noise  [B, S, A] fp32      time  [B] fp32
        returns   [B, S, A] fp32, unreduced, with a graph where gradients are on
        replaces  ``forward`` of LeRobot's ``VLAFlowMatching``
        """
        device, pair, dims = state.device.type, model.vlm_with_expert, read_dims(model)
        wide = torch.autocast(device, enabled=False)
        dtype = self._products(device)
        products = torch.autocast(device, torch.bfloat16) if dtype is torch.bfloat16 else wide
        with wide:
            x_t = self.ops.flow_point(actions, noise, time)
            state_token = model.state_proj(state)[:, None]
            suffix, _, _ = model.embed_suffix(x_t, time)
            vlm = pair.get_vlm_model()
            vision_learns = _learns(vlm.vision_model)
            # Where no sample has any camera, what learns from them still gets gradients: 0, not none. Asked on a CPU
            # alone, for elsewhere all cameras are kept.
            needed = (vision_learns or _learns(vlm.connector)) and device == "cpu"
            needed = needed and not any(bool(mask.any()) for mask in image_masks)
            observation = prepare_observation(
                images, image_masks, tokens, token_masks, state,
                stock_order=False,
                keep_cameras=model.add_image_special_tokens or needed,
                max_language=tokens.shape[1],
            )  # fmt: skip
        with products:
            image_tokens = self._image_tokens(model, dims, dtype, observation, vision_learns)
            pad_masks, prefix = self._prefix(model, dims, dtype, observation, image_tokens, state_token)
            own, cross = suffix_tokens(pad_masks, dims.chunk, dims.head_dim)
            h = expert_layers(self.ops, pair, suffix, prefix, own, cross, dims.head_dim)
        with wide:
            return self.ops.flow_loss(model.action_out_proj(h.float()), actions, noise)

    def _products(self, device: str) -> torch.dtype | None:
        """The dtype in which this thread multiplies now; None for that of each weight."""
        narrow = torch.is_autocast_enabled(device) or self.tier.gemm_dtype is torch.bfloat16
        slow = self._slow_bf16 if narrow else None  # wider products err less and are faster
        self._note("bf16 products", None if slow is None else f"{slow}; products run in fp32")
        if slow is not None:
            return torch.float32
        return torch.bfloat16 if narrow else self.tier.gemm_dtype

    def _image_tokens(
        self,
        model: Any,
        dims: Dims,
        dtype: torch.dtype | None,
        observation: Observation,
        vision_learns: bool,
    ) -> list[Tensor]:
        """One [B, tokens, M] a camera; differentiable as far down as anything learns."""
        pair = model.vlm_with_expert
        vlm, batch = pair.get_vlm_model(), observation.state.shape[0]
        if not observation.frames:
            return []
        no_cache = self._no_cache(model)
        if observation.frames[0].ndim == 3:
            if no_cache is not None:
                raise ValueError(f"image tokens are given: {no_cache}; give images")
            return list(observation.frames)
        (frames,) = prepare_images(self.ops, observation.frames, dims.image_side, together=True)
        if vision_learns or self.not_frozen is not None:
            out = pair.embed_image(frames)
        else:
            learns = _learns(vlm.connector)
            encode = partial(
                self._encoded, model, dims, dtype, upto=encode_patches if learns else encode_images
            )
            with _frozen(frames.device):
                if self.cache is None or no_cache is not None:
                    out = encode(frames)
                else:
                    read = (*vlm.vision_model.parameters(), *vlm.connector.parameters())
                    out = self.cache.encoded(frames, list(read), str(dtype), encode)
            if learns:
                out = vlm.connector(out.to(vlm.connector.modality_projection.proj.weight.dtype))
        return list(out.split(batch))

    def _encoded(
        self, model: Any, dims: Dims, dtype: torch.dtype | None, images: Tensor, upto: Any = encode_images
    ) -> Tensor:
        vlm = model.vlm_with_expert.get_vlm_model()
        positions = kept_patch_positions(self._positions, vlm, images)
        return upto(self.ops, vlm, partial(_cast, dtype), dims, images, positions)

    def _prefix(
        self,
        model: Any,
        dims: Dims,
        dtype: torch.dtype | None,
        observation: Observation,
        image_tokens: list[Tensor],
        state_token: Tensor,
    ) -> tuple[Tensor, Prefix]:
        """pad_masks [B, P] and the prefix KV, in the cheapest of three ways."""
        vlm = model.vlm_with_expert.get_vlm_model()
        layers, device = vlm.text_model.layers, state_token.device
        ends = image_ends(model, device)
        embed = partial(
            join_prefix, image_tokens, observation.image_masks, observation.tokens, observation.token_masks,
            vlm.text_model.get_input_embeddings(), image_ends=ends, length=0, dtype=torch.float32,
        )  # fmt: skip

        learns = _learns(vlm.text_model) or any(tokens.requires_grad for tokens in image_tokens)
        if learns or self.not_frozen is not None:
            embedded, pad_masks, att_masks = embed(state_token=state_token)
            rows = _prefix_rows(pad_masks, att_masks, dims)
            joint_end = not is_cross(model.vlm_with_expert, len(layers) - 1)
            return pad_masks, text_layers(
                self.ops, layers, embedded, rows, dims.head_dim, joint_end=joint_end
            )

        apart = state_token.requires_grad
        with _frozen(device):
            embedded, pad_masks, att_masks = embed(state_token=None if apart else state_token)
            none = [0] * dims.layers
            cast = partial(_cast, dtype)
            rows = _prefix_rows(pad_masks, att_masks, dims)
            kept = list(text_kv(self.ops, vlm, cast, dims, embedded, rows, none))
        if not apart:
            return pad_masks, iter(kept)
        own = torch.ones(state_token.shape[:2], dtype=torch.bool, device=device)
        place = torch.sum(pad_masks, dim=1, keepdim=True)
        pad_masks = torch.cat([pad_masks, own], dim=1)
        rows = _rows(place, pad_masks[:, None], dims)
        return pad_masks, text_layers(self.ops, layers, state_token, rows, dims.head_dim, kept)


def _cast(dtype: torch.dtype | None, matrix: Tensor) -> Tensor:
    return matrix if dtype is None else matrix.to(dtype)


@contextmanager
def _frozen(device: torch.device) -> Iterator[None]:
    """No graph, no autocast, the current CUDA device that of the tensors: what the engine's ops expect."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), current:
        yield


def _learns(module: Any) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in module.parameters())


def _prefix_rows(pad_masks: Tensor, att_masks: Tensor, dims: Dims) -> Rows:
    return _rows(torch.cumsum(pad_masks, dim=1) - 1, block_mask(pad_masks, att_masks), dims)


def _rows(positions: Tensor, visible: Tensor, dims: Dims) -> Rows:
    return Rows(rope_tables(positions, dims.head_dim), visible)
