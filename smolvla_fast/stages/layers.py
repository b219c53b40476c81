"""A decoder layer, text or expert, out of five ops: chunks, single steps and single layers are all made of these.

Four, where one has attention and what follows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..model.kv_cache import LayerKV
from ..model.weights import DecoderLayer
from ..ops.memory import Memory
from ..ops.next_norm import NextNorm
from ..ops.reference.suffix_tokens import Rope, Tokens
from ..ops.stream_offset import StreamOffset
from ..ops.table import Ops

Slots = tuple[Tensor, Tensor]
"""Where a layer's own keys and values go, each [B, T, K, D]."""


def project(
    ops: Ops,
    layer: DecoderLayer,
    x: Tensor,
    rope: Rope,
    slots: Slots | None,
    memory: Memory | None = None,
    normed: NextNorm | None = None,
) -> Tensor:
    """``q = rope(norm(x)·Wqᵀ)`` and, into ``slots``, ``rope(norm(x)·Wkᵀ)`` and ``norm(x)·Wvᵀ``.

    x       [B, T, M]      slots  None in a cross-attention layer, whose keys and values are not of x
    normed  what was prepared of x
    returns q [B, T, H, D] in the dtype of its weight
    """
    weights = (layer.q, None, None) if slots is None else (layer.q, layer.k, layer.v)
    q = ops.norm_qkv_rope(x, layer.norm1, weights, rope, slots, memory=memory, **given(normed=normed))
    assert q is not None  # it has a weight
    return q


def next_norm(ops: Ops, norm: tuple[Tensor, float], weight: Any) -> NextNorm | None:
    """What an op that writes a residual stream may prepare for the norm behind it and products with this weight."""
    return NextNorm.of(norm, weight) if ops.prepares_norms else None


def given(**hints: NextNorm | StreamOffset | Memory | None) -> dict[str, NextNorm | StreamOffset | Memory]:
    """The keyword arguments of hints that there are: most backends know none."""
    return {name: hint for name, hint in hints.items() if hint is not None}


def embed_suffix(
    ops: Ops,
    first: DecoderLayer,
    x: Tensor,
    step: int,
    folded: Any,
    time_out: tuple[Tensor, Tensor],
    memory: Memory | None = None,
) -> tuple[Tensor, NextNorm | None]:
    """``ops.suffix_embed``, and what it has prepared for the first expert layer."""
    normed = next_norm(ops, first.norm1, first.q)
    return ops.suffix_embed(x, step, folded, time_out, memory=memory, **given(next_norm=normed)), normed


def finish(
    ops: Ops,
    layer: DecoderLayer,
    x: Tensor,
    attended: Tensor,
    out: Tensor | None = None,
    memory: Memory | None = None,
    following: NextNorm | None = None,
) -> Tensor:
    """``y = x + attended·Woᵀ;  y + (silu(norm(y)·Wgateᵀ) * norm(y)·Wupᵀ)·Wdownᵀ``.

    x          [B, T, M]  the residual stream      attended  [B, T, H·D]
    out        where the sums may go, ``x`` itself too
    following  filled in for the next layer, where ops prepare norms
    returns    [B, T, M]
    replaces   what LeRobot's ``SmolVLMWithExpertModel.forward`` does behind the attention of a layer
    """
    inner = next_norm(ops, layer.norm2, layer.gate)
    x = ops.linear_residual(attended, layer.o, x, out=out, memory=memory, **given(next_norm=inner))
    return _feed_forward(ops, layer, x, out, memory, inner, following)


def _feed_forward(
    ops: Ops,
    layer: DecoderLayer,
    x: Tensor,
    out: Tensor | None,
    memory: Memory | None,
    normed: NextNorm | None,
    following: NextNorm | None,
) -> Tensor:
    """``x + (silu(norm(x)·Wgateᵀ) * norm(x)·Wupᵀ)·Wdownᵀ``, [B, T, M]."""
    hidden = ops.norm_swiglu(x, layer.norm2, layer.gate, layer.up, memory=memory, **given(normed=normed))
    return ops.linear_residual(hidden, layer.down, x, out=out, memory=memory, **given(next_norm=following))


def decoder_layer(
    ops: Ops,
    layer: DecoderLayer,
    x: Tensor,
    tokens: Tokens,
    kv: LayerKV,
    slots: Slots | None,
    out: Tensor | None = None,
    memory: Memory | None = None,
    normed: NextNorm | None = None,
    following: NextNorm | None = None,
) -> Tensor:
    """A whole layer: projections, attention with its output projection, feed-forward.

    x       [B, T, M]      tokens  rotation, and the mask as ``ops.prepare_mask`` gives it
    kv      what the tokens attend to, [B, S, K, D] each; read after ``slots`` are written, which may be views of it
    normed, following  what the layer before has prepared of x, and what this one may prepare for the next
    returns [B, T, M]
    """
    q = project(ops, layer, x, tokens.rope, slots, memory, normed)
    if ops.attention_residual is None:
        attended = ops.masked_attention(q, kv.k, kv.v, tokens.mask, memory=memory)
        return finish(ops, layer, x, attended, out, memory, following)
    inner = next_norm(ops, layer.norm2, layer.gate)
    attend = ops.attention_residual
    x = attend(q, kv.k, kv.v, tokens.mask, layer.o, x, out=out, memory=memory, **given(next_norm=inner))
    return _feed_forward(ops, layer, x, out, memory, inner, following)


def expert_layers(
    ops: Ops,
    layers: Sequence[DecoderLayer],
    kvs: Iterable[LayerKV],
    x: Tensor,
    own: Tokens,
    cross: Tokens,
    memory: Memory | None = None,
    normed: NextNorm | None = None,
) -> Tensor:
    """The expert over the suffix, one denoise step: x [B, S, E], which may be overwritten, -> [B, S, E].

    x, normed  of ``embed_suffix``
    kvs    one per layer, asked for as it begins: with slots for the suffix behind the prefix, or the expert's cross KV
    own    positions counted on from the prefix, [prefix | suffix so far] visible: self-attention layers
    cross  positions from 0, the prefix visible: cross-attention layers
    """
    prefix = cross.mask.shape[-1]
    for layer, after, kv in zip(layers, (*layers[1:], None), kvs, strict=True):
        slots = None if layer.cross else kv.suffix(prefix)
        following = None if after is None else next_norm(ops, after.norm1, after.q)
        tokens = cross if layer.cross else own
        x = decoder_layer(ops, layer, x, tokens, kv, slots, x, memory, normed, following)
        normed = following
    return x
