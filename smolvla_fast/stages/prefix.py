"""Stage 3: image tokens, language and state -> the prefix KV, and the expert's cross KV; once a chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.dims import Dims
from ..model.kv_cache import LayerKV, PrefixKV, empty_kv, with_free_slots
from ..model.weights import Affine, Cast, DecoderLayer, read_text_layers
from ..ops.reference.masks import block_mask
from ..ops.reference.rope import rope_tables
from ..ops.reference.suffix_tokens import Tokens
from ..ops.table import Ops
from .layers import decoder_layer
from .observation import Observation


def embed_prefix(
    observation: Observation,
    image_tokens: list[Tensor],
    vlm: Any,
    state_token: Tensor | None,
    image_ends: tuple[Tensor, Tensor] | None,
    length: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Join [image tokens of each camera | language | state], images and language scaled by sqrt(M).

    image_tokens  C of [B, tokens, M]
    state_token   [B, M] or [B, n, M]  of ``embed_state``; None leaves the state out
    image_ends    token ids before and after each camera, where the checkpoint asks for them
    length        pad the prefix to at least this many tokens
    dtype         of the residual stream; None lets stock's own promotions decide
    returns       embeddings [B, P, M], pad_masks [B, P] bool, att_masks [B, P] bool (1 starts a new block: the state,
                  which images and language do not see)
    replaces      ``embed_prefix`` of LeRobot's ``VLAFlowMatching``
    """
    embed = vlm.text_model.get_input_embeddings()
    table = embed.weight
    batch, device = observation.state.shape[0], observation.state.device
    parts: list[Tensor] = []
    masks: list[Tensor] = []

    def widen(x: Tensor) -> Tensor:
        return x if dtype is None else x.to(dtype)

    def special(ids: Tensor) -> None:
        parts.append(widen(embed(ids.to(table.device)))[None].expand(batch, -1, -1))
        masks.append(torch.ones(batch, len(ids), dtype=torch.bool, device=device))

    for tokens, mask in zip(image_tokens, observation.image_masks, strict=True):
        if image_ends is not None:
            special(image_ends[0])
        tokens = widen(tokens)
        parts.append(tokens * torch.full((), tokens.shape[-1] ** 0.5, dtype=tokens.dtype, device=device))
        masks.append(mask[:, None].expand(batch, tokens.shape[1]))
        if image_ends is not None:
            special(image_ends[1])
    parts.append(widen(embed(observation.tokens)) * math.sqrt(table.shape[1]))
    masks.append(observation.token_masks)
    unseen = sum(part.shape[1] for part in parts)
    if state_token is not None:
        parts.append(state_token[:, None, :] if state_token.ndim == 2 else state_token)
        masks.append(torch.ones(parts[-1].shape[:2], dtype=torch.bool, device=device))

    embeddings, pad_masks = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
    att_masks = torch.zeros_like(pad_masks)
    att_masks[:, unseen:].fill_(True)
    missing = length - embeddings.shape[1]
    if missing > 0:
        embeddings = F.pad(embeddings, (0, 0, 0, missing))
        pad_masks, att_masks = F.pad(pad_masks, (0, missing)), F.pad(att_masks, (0, missing))
    return embeddings, pad_masks, att_masks


def embed_state(state: Tensor, projection: Affine) -> Tensor:
    """[B, R] -> the state token [B, M]."""
    return F.linear(state, *projection)


def fill_prefix(
    ops: Ops,
    vlm: Any,
    cast: Cast,
    dims: Dims,
    embeddings: Tensor,
    pad_masks: Tensor,
    att_masks: Tensor,
    expert: list[DecoderLayer],
    stock_by_head: bool | None = None,
    cross_dtype: torch.dtype | None = None,
) -> PrefixKV:
    """Run the text layers for the keys and values they leave behind.

    embeddings  [B, P, M]      pad_masks, att_masks  [B, P]      stock_by_head  of ``text_kv``
    cross_dtype of the expert's cross KV, that of their weights where not given
    returns     for each layer, prefix KV with free slots behind it (self) or the expert's projections of it (cross)
    replaces    the prefill call of ``SmolVLMWithExpertModel.forward``

    Of the last layer only keys and values are ever read, so its queries, attention and feed-forward are not computed.
    """
    free = [0 if partner.cross else dims.chunk for partner in expert]
    found = text_kv(ops, vlm, cast, dims, embeddings, pad_masks, att_masks, free, stock_by_head)
    layers = [
        LayerKV(*ops.cross_kv(k, v, partner.k, partner.v, cross_dtype)) if partner.cross else LayerKV(k, v)
        for (k, v), partner in zip(found, expert, strict=True)
    ]
    return PrefixKV(layers, pad_masks)


def text_kv(
    ops: Ops,
    vlm: Any,
    cast: Cast,
    dims: Dims,
    embeddings: Tensor,
    pad_masks: Tensor,
    att_masks: Tensor,
    free: Sequence[int],
    stock_by_head: bool | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The text layers one by one, each giving its keys and values [B, P + free, K, D], the last ``free`` unwritten.

    embeddings  [B, P, M]      pad_masks, att_masks  [B, P]      free  slots behind the prefix, a number a layer
    stock_by_head  the ``exact`` tier: the prefix in one piece and laid out as stock does (``keeps_kv_by_head``). Where each
                   query head has keys of its own, attention multiplies with them where they lie, and the last bit of a
                   product depends on that
    """
    batch, prefix = pad_masks.shape
    rope = rope_tables(torch.cumsum(pad_masks, dim=1) - 1, dims.head_dim)
    tokens = Tokens(rope, ops.prepare_mask(block_mask(pad_masks, att_masks)))
    x = embeddings
    for i, (layer, slots) in enumerate(zip(read_text_layers(vlm, cast), free, strict=True)):
        last = i == dims.layers - 1
        room = slots if stock_by_head is None else 0
        shape = (batch, prefix + room, dims.kv_heads, dims.head_dim)
        k, v = (empty_kv(shape, bool(stock_by_head), layer.k.dtype, x.device) for _ in range(2))
        prefix_kv = (k[:, :prefix], v[:, :prefix])
        if last:  # nobody reads more of it than its keys and values
            ops.norm_qkv_rope(x, layer.norm1, (None, layer.k, layer.v), tokens.rope, prefix_kv)
        else:
            x = decoder_layer(ops, layer, x, tokens, LayerKV(*prefix_kv), prefix_kv)
        if slots > room:
            k, v = (with_free_slots(each, slots, bool(stock_by_head)) for each in (k, v))
        yield k, v


def image_ends(model: Any, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Token ids before and after each camera, where the checkpoint asks for them."""
    if not model.add_image_special_tokens:
        return None
    return model.global_image_start_token.to(device), model.image_end_token.to(device)
