"""Stage 3: image tokens, language and state -> the prefix KV, and the expert's cross KV; once a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.dims import Dims
from ..model.kv_cache import LayerKV, PrefixKV, empty_kv, with_free_slots
from ..model.weights import Cast, DecoderLayer, read_text_layers, read_text_norms
from ..ops.reference.suffix_tokens import Tokens
from ..ops.table import Ops
from .layers import decoder_layer, given, next_norm


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

    embeddings, pad_masks, att_masks  of ``ops.prefix_embed``      stock_by_head  of ``text_kv``
    cross_dtype of the expert's cross KV, that of their weights where not given
    returns     for each layer, prefix KV with free slots behind it (self) or the expert's projections of it (cross)
    replaces    the prefill call of ``SmolVLMWithExpertModel.forward``

    Of the last layer only keys and values are ever read, so its queries, attention and feed-forward are not computed.
    """
    tokens, own, cross = ops.rope_masks(pad_masks, att_masks, dims.chunk, dims.head_dim)
    found = text_kv(ops, vlm, cast, dims, embeddings, tokens, free_slots(dims, expert), stock_by_head)
    layers = [
        layer_kv(ops, partner, k, v, cross_dtype) for (k, v), partner in zip(found, expert, strict=True)
    ]
    return PrefixKV(layers, pad_masks, own, cross)


def free_slots(dims: Dims, expert: Sequence[DecoderLayer]) -> list[int]:
    """Slots for the suffix behind the prefix KV, a number a layer: a self-attention layer of the expert writes there."""
    return [0 if partner.cross else dims.chunk for partner in expert]


def layer_kv(
    ops: Ops, partner: DecoderLayer, k: Tensor, v: Tensor, cross_dtype: torch.dtype | None
) -> LayerKV:
    """What an expert layer attends to, of the keys and values of its text layer."""
    return LayerKV(*ops.cross_kv(k, v, partner.k, partner.v, cross_dtype)) if partner.cross else LayerKV(k, v)


def text_kv(
    ops: Ops,
    vlm: Any,
    cast: Cast,
    dims: Dims,
    embeddings: Tensor,
    tokens: Tokens,
    free: Sequence[int],
    stock_by_head: bool | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The text layers one by one, each giving its keys and values [B, P + free, K, D], the last ``free`` unwritten.

    embeddings  [B, P, M]      tokens  of the prefix among itself      free  slots behind the prefix, a number a layer
    stock_by_head  the ``exact`` tier: the prefix in one piece and laid out as stock does (``keeps_kv_by_head``). Where each
                   query head has keys of its own, attention multiplies with them where they lie, and the last bit of a
                   product depends on that
    """
    batch, prefix = embeddings.shape[:2]
    tokens = tokens._replace(mask=ops.prepare_mask(tokens.mask))
    x, normed, norms = embeddings, None, read_text_norms(vlm)
    for i, (layer, slots) in enumerate(zip(read_text_layers(vlm, cast), free, strict=True)):
        last = i == dims.layers - 1
        room = slots if stock_by_head is None else 0
        shape = (batch, prefix + room, dims.kv_heads, dims.head_dim)
        k, v = (empty_kv(shape, bool(stock_by_head), layer.k.dtype, x.device) for _ in range(2))
        prefix_kv = (k[:, :prefix], v[:, :prefix])
        if last:  # nobody reads more of it than its keys and values
            weights = (None, layer.k, layer.v)
            ops.norm_qkv_rope(x, layer.norm1, weights, tokens.rope, prefix_kv, **given(normed=normed))
        else:
            following, kv = next_norm(ops, norms[i + 1], layer.q), LayerKV(*prefix_kv)
            x = decoder_layer(ops, layer, x, tokens, kv, prefix_kv, normed=normed, following=following)
            normed = following
        if slots > room:
            k, v = (with_free_slots(each, slots, bool(stock_by_head)) for each in (k, v))
        yield k, v


def image_ends(model: Any, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Token ids before and after each camera, where the checkpoint asks for them."""
    if not model.add_image_special_tokens:
        return None
    return model.global_image_start_token.to(device), model.image_end_token.to(device)
