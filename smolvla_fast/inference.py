"""The score for acting: observation -> image tokens -> prefix KV -> denoise -> action chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import select
from .dims import read_dims
from .precision import Tier
from .reference.euler_step import Guidance
from .reference.time_embedding import time_embedding
from .stages.denoise import denoise
from .stages.observation import prepare_observation
from .stages.prefix import embed_prefix, fill_prefix
from .stages.vision import encode_images, patch_positions
from .timing import section
from .weights import read_expert_layers, read_heads


class Engine:
    """Computes action chunks for one model in one tier. Holds no weights: they are read from the model at each call."""

    def __init__(self, tier: Tier, backend: str, device: torch.device) -> None:
        self.tier = tier
        self.ops = select(backend, device, tier.stock_order)
        self._positions: dict[tuple[int, torch.dtype], Tensor] = {}

    def act(
        self,
        model: Any,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        tokens: Tensor,
        token_masks: Tensor,
        state: Tensor,
        noise: Tensor,
        guidance: Sequence[Guidance] | None = None,
        *,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """One action chunk.

        model        a ``VLAFlowMatching``, LeRobot's or ours
        images       C of [B, 3, side, side] in [-1, 1]      image_masks  C of [B] bool
        tokens       [B, T] token ids      token_masks  [B, T] bool      state  [B, R]      noise  [B, S, A] fp32
        guidance     one a step where real-time chunking is on
        watch        called with (x, v) after every step
        returns      [B, S, A] fp32, a fresh tensor
        replaces     ``sample_actions`` of LeRobot's ``VLAFlowMatching``
        """
        pair, config = model.vlm_with_expert, model.config
        vlm, dims, ops, exact = pair.get_vlm_model(), read_dims(model), self.ops, self.tier.stock_order
        heads = read_heads(model)
        with torch.no_grad():
            observation = prepare_observation(
                images, image_masks, tokens, token_masks, state,
                stock_order=exact, keep_cameras=model.add_image_special_tokens, max_language=config.tokenizer_max_length,
            )  # fmt: skip
            with section("vision"):
                image_tokens: list[Tensor] = []
                for group in observation.image_groups:
                    positions = self._patch_positions(vlm, group)
                    out = encode_images(ops, vlm, self._cast, dims, group, positions)
                    image_tokens += out.split(state.shape[0])
            with section("prefix"):
                embedded = embed_prefix(
                    observation, image_tokens, vlm, heads.state,
                    image_ends=_image_ends(model), length=model.prefix_length if exact else 0,
                    dtype=None if exact else torch.float32,
                )  # fmt: skip
                expert = read_expert_layers(pair, self._cast, self._widen)
                kv = fill_prefix(ops, vlm, self._cast, dims, *embedded, expert)
            with section("denoise"):
                times = _time_embeddings(config, dims.expert_width, state.shape[0], noise.device)
                return denoise(ops, dims, expert, heads, kv, noise, times, guidance, watch)

    def _cast(self, matrix: Tensor) -> Tensor:
        dtype = self.tier.gemm_dtype
        return matrix if dtype is None or matrix.dtype is dtype else matrix.to(dtype)

    def _widen(self, matrix: Tensor) -> Tensor:
        """For matrices that no tier narrows: the expert's cross K/V, fp32 in LeRobot's bf16 layout."""
        return self._cast(matrix) if self.tier.gemm_dtype is torch.float32 else matrix

    @property
    def bytes(self) -> int:
        """What the engine holds between chunks: position ids of the patches, and no weights."""
        return sum(ids.nbytes for ids in self._positions.values())

    def _patch_positions(self, vlm: Any, images: Tensor) -> Tensor:
        key = (images.shape[-1], vlm.vision_model.embeddings.patch_embedding.weight.dtype)
        if key not in self._positions or self._positions[key].device != images.device:
            self._positions[key] = patch_positions(vlm, images)
        return self._positions[key]


def _image_ends(model: Any) -> tuple[Tensor, Tensor] | None:
    return (model.global_image_start_token, model.image_end_token) if model.add_image_special_tokens else None


def _time_embeddings(config: Any, width: int, batch: int, device: torch.device) -> Tensor:
    """[N, B, E] fp64: the embedding of t = 1, 1 - 1/N, ... for every sample."""
    steps = config.num_steps
    dt = -1.0 / steps
    times = (
        torch.full((batch,), 1.0 + step * dt, dtype=torch.float32, device=device) for step in range(steps)
    )
    return torch.stack([time_embedding(t, width, config.min_period, config.max_period) for t in times])
