"""A decoder layer, text or expert, out of five ops: chunks, single steps and single layers are all made of these.

Four, where one has attention and what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..model.kv_cache import LayerKV
from ..model.weights import DecoderLayer
from ..ops.memory import Memory
from ..ops.reference.suffix_tokens import Rope, Tokens
from ..ops.table import Ops

Slots = tuple[Tensor, Tensor]
"""Where a layer's own keys and values go, each [B, T, K, D]."""


def project(
    ops: Ops, layer: DecoderLayer, x: Tensor, rope: Rope, slots: Slots | None, memory: Memory | None = None
) -> Tensor:
    """``q = rope(norm(x)·Wqᵀ)`` and, into ``slots``, ``rope(norm(x)·Wkᵀ)`` and ``norm(x)·Wvᵀ``.

    x       [B, T, M]      slots  None in a cross-attention layer, whose keys and values are not of x
    returns q [B, T, H, D] in the dtype of its weight
    """
    weights = (layer.q, None, None) if slots is None else (layer.q, layer.k, layer.v)
    q = ops.norm_qkv_rope(x, layer.norm1, weights, rope, slots, memory=memory)
    assert q is not None  # it has a weight
    return q


def finish(
    ops: Ops,
    layer: DecoderLayer,
    x: Tensor,
    attended: Tensor,
    out: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """``y = x + attended·Woᵀ;  y + (silu(norm(y)·Wgateᵀ) * norm(y)·Wupᵀ)·Wdownᵀ``.

    x       [B, T, M]  the residual stream      attended  [B, T, H·D]
    out     where the sums may go, ``x`` itself too
    returns [B, T, M]
    replaces what LeRobot's ``SmolVLMWithExpertModel.forward`` does behind the attention of a layer
    """
    return feed_forward(ops, layer, ops.linear_residual(attended, layer.o, x, out=out), out, memory)


def feed_forward(
    ops: Ops, layer: DecoderLayer, x: Tensor, out: Tensor | None = None, memory: Memory | None = None
) -> Tensor:
    """``x + (silu(norm(x)·Wgateᵀ) * norm(x)·Wupᵀ)·Wdownᵀ``, [B, T, M]; out as in ``finish``."""
    hidden = ops.norm_swiglu(x, layer.norm2, layer.gate, layer.up, memory=memory)
    return ops.linear_residual(hidden, layer.down, x, out=out)


def decoder_layer(
    ops: Ops,
    layer: DecoderLayer,
    x: Tensor,
    tokens: Tokens,
    kv: LayerKV,
    slots: Slots | None,
    out: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """A whole layer: ``finish(x, attention(project(x), kv))``.

    x       [B, T, M]      tokens  rotation, and the mask as ``ops.prepare_mask`` gives it
    kv      what the tokens attend to, [B, S, K, D] each; read after ``slots`` are written, which may be views of it
    returns [B, T, M]
    """
    q = project(ops, layer, x, tokens.rope, slots, memory)
    if ops.attention_residual is not None:
        x = ops.attention_residual(q, kv.k, kv.v, tokens.mask, layer.o, x, out=out, memory=memory)
        return feed_forward(ops, layer, x, out, memory)
    attended = ops.masked_attention(q, kv.k, kv.v, tokens.mask, memory=memory)
    return finish(ops, layer, x, attended, out, memory)


def expert_layers(
    ops: Ops,
    layers: Sequence[DecoderLayer],
    kvs: Sequence[LayerKV],
    x: Tensor,
    own: Tokens,
    cross: Tokens,
    memory: Memory | None = None,
) -> Tensor:
    """The expert over the suffix, one denoise step: x [B, S, E], overwritten, -> [B, S, E].

    kvs    one per layer: with slots for the suffix behind the prefix, or the expert's cross KV
    own    positions counted on from the prefix, [prefix | suffix so far] visible: self-attention layers
    cross  positions from 0, the prefix visible: cross-attention layers
    """
    prefix = cross.mask.shape[-1]
    for layer, kv in zip(layers, kvs, strict=True):
        slots = None if layer.cross else kv.suffix(prefix)
        x = decoder_layer(ops, layer, x, cross if layer.cross else own, kv, slots, out=x, memory=memory)
    return x
