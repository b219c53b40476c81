"""The engine's computation as three plain torch modules, so that other runtimes can be given the same work.

Vision tower and connector; text layers and the expert's cross KV; one denoise step. What the engine leaves out is left
out here: the last text layer computes keys and values alone, masks and rope tables are made once a chunk, the suffix
embedding is folded, cross KV is projected once. Nothing is written in place and no shape depends on a value, so a trace
of a module is the module. Weights are the policy's own, not copied.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolvla_fast.model.dims import Dims, read_dims
from smolvla_fast.model.weights import (
    DecoderLayer,
    VisionLayer,
    read_expert_layers,
    read_heads,
    read_patch_embedding,
    read_text_layers,
    read_vision_end,
    read_vision_layers,
)
from smolvla_fast.ops.torch.vision import patch_embed

NOT_SEEN = -1e9
"""Added to the score of a masked key: its weight is 0 in fp32, and bf16 can hold the number."""


def detached(value: Any) -> Any:
    """The same memory without gradients, which a trace could not hold: of a tensor, or of what ``weights`` gathers."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, list):
        return [detached(each) for each in value]
    if isinstance(value, tuple):
        made = [detached(each) for each in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    if is_dataclass(value):
        return replace(value, **{each.name: detached(getattr(value, each.name)) for each in fields(value)})  # type: ignore[type-var]
    return value


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """x [B, T, H, D]; sin, cos [B, T, 1, D/2]; see ``reference.rope.apply_rope``."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """See ``reference.masked_attention``; the query heads of a KV head are rows of one product, so k and v are not spread.

    q [B, T, H, D]      k, v [B, S, K, D]      mask [B, 1, G·T, S], added to the scores      returns [B, T, H·D]
    """
    batch, tokens, heads, size = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    rows = q.view(batch, tokens, kv_heads, group, size).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * tokens, size)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    out = out.view(batch, kv_heads, group, tokens, size).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, tokens, heads * size)


def added_mask(seen: Tensor, group: int) -> Tensor:
    """A bool mask [B, T, S] in the form of ``grouped_attention``."""
    added = torch.zeros(seen.shape).masked_fill(~seen, NOT_SEEN)
    return added[:, None].repeat(1, 1, group, 1)


def feed_forward(x: Tensor, layer: DecoderLayer) -> Tensor:
    h = rms_norm(x, layer.norm2.weight, layer.norm2.eps)
    h = F.silu(F.linear(h, layer.gate)) * F.linear(h, layer.up)
    return x + F.linear(h, layer.down)


def as_stored(matrix: Tensor) -> Tensor:
    return matrix


class Vision(nn.Module):
    """images [n, 3, side, side] in [-1, 1] -> image tokens [n, tokens, M]."""

    def __init__(self, model: Any, positions: Tensor) -> None:
        super().__init__()
        vlm = model.vlm_with_expert.get_vlm_model()
        self.dims: Dims = read_dims(model)
        self.positions = positions
        self.patch, self.table = detached(read_patch_embedding(vlm, as_stored))
        self.layers: list[VisionLayer] = detached(list(read_vision_layers(vlm, as_stored)))
        self.norm, self.connector = detached(read_vision_end(vlm, as_stored))

    def forward(self, images: Tensor) -> Tensor:
        x = patch_embed(images, *self.patch, self.table, self.positions)
        for layer in self.layers:
            x = self.layer(x, layer)
        weight, bias, eps = self.norm
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return self.connect(x)

    def connect(self, x: Tensor) -> Tensor:
        """See ``reference.pixel_shuffle_linear``; by F.linear, for oneDNN's own op is torch's alone."""
        n, _, width = x.shape
        factor = self.dims.shuffle
        small = self.dims.image_side // self.dims.patch // factor
        x = x.view(n, small, factor, small, factor * width).permute(0, 1, 3, 2, 4)
        return F.linear(x.reshape(n, small * small, factor * factor * width), self.connector)

    def layer(self, x: Tensor, layer: VisionLayer) -> Tensor:
        def norm(x: Tensor, which: Any) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], which.weight, which.bias, which.eps)

        n, tokens, width = x.shape
        h = norm(x, layer.norm1)
        q, k, v = (
            F.linear(h, affine.weight, affine.bias)
            .view(n, tokens, self.dims.vision_heads, -1)
            .transpose(1, 2)
            for affine in (layer.q, layer.k, layer.v)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + F.linear(h, *layer.out)
        h = F.gelu(F.linear(norm(x, layer.norm2), *layer.up), approximate="tanh")
        return x + F.linear(h, *layer.down)


class Prefix(nn.Module):
    """embeddings, mask, sin, cos -> for each layer k and v: of the prefix, or the expert's projections of it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        pair = model.vlm_with_expert
        self.dims: Dims = read_dims(model)
        self.layers: list[DecoderLayer] = detached(list(read_text_layers(pair.get_vlm_model(), as_stored)))
        self.expert: list[DecoderLayer] = detached(read_expert_layers(pair, as_stored, as_stored))

    def forward(self, x: Tensor, mask: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for i, (layer, partner) in enumerate(zip(self.layers, self.expert, strict=True)):
            h = rms_norm(x, layer.norm1.weight, layer.norm1.eps)
            k, v = (self.heads(F.linear(h, weight)) for weight in (layer.k, layer.v))
            k = rotate(k, sin, cos)
            if i < len(self.layers) - 1:
                q = rotate(self.heads(F.linear(h, layer.q)), sin, cos)
                x = x + F.linear(grouped_attention(q, k, v, mask), layer.o)
                x = feed_forward(x, layer)
            if partner.cross:
                k, v = (
                    self.heads(F.linear(each.flatten(2), weight))
                    for each, weight in ((k, partner.k), (v, partner.v))
                )
            found += [k, v]
        return tuple(found)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.dims.head_dim)


class Step(nn.Module):
    """x, the folded bias of the step, masks, rope tables and 2L of KV -> x one Euler step on.

    steps   N: how far a step goes      fold  [E, A], of ``aten.suffix.suffix_fold``
    """

    def __init__(self, model: Any, steps: int, fold: Tensor) -> None:
        super().__init__()
        self.dims: Dims = read_dims(model)
        self.expert: list[DecoderLayer] = detached(
            read_expert_layers(model.vlm_with_expert, as_stored, as_stored)
        )
        self.ends = detached(read_heads(model))
        self.steps, self.fold = steps, fold

    def forward(
        self, x: Tensor, bias: Tensor, self_mask: Tensor, cross_mask: Tensor, rope: Tensor, *kv: Tensor
    ) -> Tensor:
        """rope   [4, B, S, 1, D/2]: sin and cos of the self layers, then of the cross layers."""
        h = F.linear(F.silu(F.linear(x, self.fold) + bias), *self.ends.time_out)
        self_rope, cross_rope = (rope[0], rope[1]), (rope[2], rope[3])
        for i, layer in enumerate(self.expert):
            k, v = kv[2 * i], kv[2 * i + 1]
            y = rms_norm(h, layer.norm1.weight, layer.norm1.eps)
            q = self.heads(F.linear(y, layer.q))
            if layer.cross:
                a = grouped_attention(rotate(q, *cross_rope), k, v, cross_mask)
            else:
                new = rotate(self.heads(F.linear(y, layer.k)), *self_rope)
                k, v = torch.cat([k, new], 1), torch.cat([v, self.heads(F.linear(y, layer.v))], 1)
                a = grouped_attention(rotate(q, *self_rope), k, v, self_mask)
            h = feed_forward(h + F.linear(a, layer.o), layer)
        norm, out = self.ends.expert_norm, self.ends.action_out
        return x - F.linear(rms_norm(h, norm.weight, norm.eps), *out) / self.steps

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.dims.head_dim)
