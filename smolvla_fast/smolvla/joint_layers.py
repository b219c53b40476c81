"""The parts of a layer outside attention, for VLM and expert: projections before it, residuals and MLP after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .smolvlm import LlamaDecoderLayer

Layers = list[list[Any]]
"""Per stream (VLM, expert) its ``LlamaDecoderLayer`` at each depth, None where the expert has none."""


def project_qkv(layer: LlamaDecoderLayer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and projections: [B, T, width] to q [B, T, H, D] and k, v [B, T, K, D]."""
    attention = layer.self_attn
    hidden = layer.input_layernorm(hidden).to(attention.q_proj.weight.dtype)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    q = attention.q_proj(hidden).view(shape)
    k = attention.k_proj(hidden).view(shape)
    return q, k, attention.v_proj(hidden).view(shape)


def project_cached(projection: nn.Linear, states: Tensor, head_dim: int) -> Tensor:
    """The VLM's keys or values [B, P, K, D] through a projection of the expert, in that projection's dtype."""
    flat = states.to(projection.weight.dtype).reshape(*states.shape[:2], -1)
    return projection(flat).view(*flat.shape[:-1], -1, head_dim)


def finish_layer(
    model_layers: Layers, inputs_embeds: list[Tensor | None], layer_idx: int, attended: list[Any]
) -> list[Tensor | None]:
    """Output projection, residual and MLP of each stream, after attention: one joint tensor, or one per stream."""
    outputs: list[Tensor | None] = []
    start = 0
    for stream, hidden in enumerate(inputs_embeds):
        layer = model_layers[stream][layer_idx]
        if hidden is None or layer is None:
            outputs.append(hidden)
            continue
        out = attended[stream] if stream < len(attended) else attended[0]
        end = start + hidden.shape[1]
        projection = layer.self_attn.o_proj
        out = projection(out.to(projection.weight.dtype)[:, start:end])
        # In place, so that the sum keeps the projection's dtype where dtypes are mixed.
        out += hidden
        residual = out.clone()
        out = layer.mlp(layer.post_attention_layernorm(out))
        out += residual
        outputs.append(out)
        start = end if len(attended) == 1 else 0
    return outputs
