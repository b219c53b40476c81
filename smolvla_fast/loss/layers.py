"""Text and expert layers with gradients: the live modules, over one fused attention.

The linear layers, norms and MLPs are the policy's own modules, so that adapters, biases and autocast do what they do in
stock. What stock makes by hand is not: scores in memory in fp32, a copy of each KV head for each of its query heads,
rotary tables anew in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..model.weights import is_cross
from ..ops.reference.suffix_tokens import Rope
from ..ops.reference.suffix_tokens import Tokens as Rows
from ..ops.table import Ops


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """``reference.rope.apply_rope`` under autograd: in fp32, rounded once to the dtype of x."""
    sin, cos = rope
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def normed(layer: Any, x: Tensor) -> Tensor:
    """x through the norm before attention, in the dtype of the projections."""
    return layer.input_layernorm(x).to(layer.self_attn.q_proj.weight.dtype)


def heads(projection: Any, x: Tensor, head_dim: int) -> Tensor:
    """[B, T, M] -> [B, T, heads, D]."""
    return projection(x).view(*x.shape[:2], -1, head_dim)


def qkv(layer: Any, x: Tensor, rope: Rope, head_dim: int, keys: bool = True) -> tuple[Tensor, Any, Any]:
    """q [B, T, H, D], and k, v [B, T, K, D] unless ``keys`` are of another stream: norm, projections, rotation."""
    h, attention = normed(layer, x), layer.self_attn
    q = rotate(heads(attention.q_proj, h, head_dim), rope)
    if not keys:
        return q, None, None
    return q, rotate(heads(attention.k_proj, h, head_dim), rope), heads(attention.v_proj, h, head_dim)


def attention(ops: Ops, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``ops.attention_with_grad``, whose rows that see nothing are stock's: they weigh all keys alike, as a query of zeros
    does that sees all."""
    nothing = ~mask.any(-1)[:, :, None, None]
    return ops.attention_with_grad(q.masked_fill(nothing, 0), k, v, mask)


def cross_kv(layer: Any, k: Tensor, v: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The expert's projections of the prefix's keys and values, [B, P, K, D] each."""
    attention = layer.self_attn
    dtype = attention.k_proj.weight.dtype
    return (
        heads(attention.k_proj, k.to(dtype).flatten(2), head_dim),
        heads(attention.v_proj, v.to(dtype).flatten(2), head_dim),
    )


def finish(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Output projection, MLP and both residual additions, these in fp32."""
    projection, mlp = layer.self_attn.o_proj, layer.mlp
    x = x + projection(attended.to(projection.weight.dtype))
    h = layer.post_attention_layernorm(x)
    return x + mlp(h.to(mlp.gate_proj.weight.dtype))


class _Beside(torch.autograd.Function):
    """x as it is; ``unread`` [any shape] gets a gradient of zeros, where without this it had none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unread: Tensor) -> Tensor:
        ctx.like = unread.new_zeros(()).expand(unread.shape)  # one number, not the tensor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.like


def text_layers(
    ops: Ops,
    layers: Any,
    x: Tensor,
    rows: Rows,
    head_dim: int,
    frozen: list[tuple[Tensor, Tensor]] | None = None,
    joint_end: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [B, P, K, D] of each text layer over a whole prefix; of the last nothing else is read.

    x          [B, P, M], or [B, n, M] of the last n tokens where the others are frozen: those see nothing of what comes
               behind them
    frozen     keys and values of the others, a pair a layer; the last n rows alone then have a gradient
    joint_end  the last layer is of self-attention: stock's softmax then has rows for the prefix as well, so that its
               queries, which nobody reads, get a gradient of zeros, and DDP waits for it
    """
    for i, layer in enumerate(layers):
        h = normed(layer, x)
        last = i == len(layers) - 1
        q = None if last else rotate(heads(layer.self_attn.q_proj, h, head_dim), rows.rope)
        k = rotate(heads(layer.self_attn.k_proj, h, head_dim), rows.rope)
        v = heads(layer.self_attn.v_proj, h, head_dim)
        if last and joint_end and any(each.requires_grad for each in layer.self_attn.q_proj.parameters()):
            k = _Beside.apply(k, layer.self_attn.q_proj(h))
        if frozen is not None:
            k, v = torch.cat([frozen[i][0], k], dim=1), torch.cat([frozen[i][1], v], dim=1)
        yield k, v
        if q is not None:
            x = finish(layer, x, ops.attention_with_grad(q, k, v, rows.mask))


def expert_layers(
    ops: Ops,
    pair: Any,
    x: Tensor,
    prefix: Iterator[tuple[Tensor, Tensor]],
    own: Rows,
    cross: Rows,
    head_dim: int,
) -> Tensor:
    """The expert over the suffix x [B, S, E], layer by layer with the prefix's keys and values: [B, S, E].

    own    positions counted on from the prefix, [prefix | suffix so far] visible: self-attention layers
    cross  positions from 0, the prefix visible: cross-attention layers, over projections of its keys and values
    """
    for i, (layer, (k, v)) in enumerate(zip(pair.lm_expert.layers, prefix, strict=True)):
        crosses = is_cross(pair, i)
        rows = cross if crosses else own
        q, own_k, own_v = qkv(layer, x, rows.rope, head_dim, keys=not crosses)
        if crosses:
            k, v = cross_kv(layer, k, v, head_dim)
        else:
            k, v = torch.cat([k, own_k], dim=1), torch.cat([v, own_v], dim=1)
        a = ops.attention_with_grad(q, k, v, rows.mask)
        x = finish(layer, x, a)
    return pair.lm_expert.norm(x)
