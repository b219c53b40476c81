"""Builds the backbone, cut to its first layers, and the expert; loads the backbone's weights if asked to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .smolvlm import LlamaModel, SmolVLMForConditionalGeneration, initialise_weights
from .vlm_config import LlamaConfig, SmolVLMConfig
from .weights_io import load_weights, read_backbone


def get_intermediate_size(hidden_dim: int, ffn_dim_multiplier: int = 4, multiple_of: int = 256) -> int:
    """Width of the expert's gated MLP: 8/3 of the hidden size, rounded up to a multiple of ``multiple_of``."""
    width = int(ffn_dim_multiplier * int(2 * hidden_dim / 3))
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def build_vlm(
    config: SmolVLMConfig, model_id: str, layers: int, load: bool
) -> SmolVLMForConditionalGeneration:
    """The VLM with its first ``layers`` text layers alone; its config keeps the backbone's own number.

    load  take the backbone's weights, in bf16; else random ones, in the config's dtypes
    """
    if load:
        for part in (config, config.text_config, config.vision_config):
            part.dtype = torch.bfloat16
    total, config.text_config.num_hidden_layers = config.text_config.num_hidden_layers, layers
    vlm = SmolVLMForConditionalGeneration(config)
    config.text_config.num_hidden_layers = total
    if load:
        dropped = tuple(f"model.text_model.layers.{i}." for i in range(layers, total))
        tensors = {k: v for k, v in read_backbone(model_id).items() if not k.startswith(dropped)}
        # A backbone with tied embeddings saves its head as the embedding.
        if "lm_head.weight" not in tensors and config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors["model.text_model.embed_tokens.weight"]
        vlm.to(torch.bfloat16)
        load_weights(vlm, tensors, strict=True, source=f"the backbone {model_id!r}")
        vlm.eval()
    return vlm


def build_expert(text: LlamaConfig, width_multiplier: float, crosses: Sequence[bool]) -> LlamaModel:
    """An expert with random weights, of a width relative to the VLM's text layers.

    crosses  per layer, whether it is a cross-attention layer: its ``k_proj`` and ``v_proj`` then read the VLM's keys and
             values, of another width, and keep the default dtype
    """
    config = copy.deepcopy(text)
    config.hidden_size = int(text.hidden_size * width_multiplier)
    config.intermediate_size = get_intermediate_size(config.hidden_size)
    config.num_hidden_layers = len(crosses)
    expert = LlamaModel(config, embed=False)
    initialise_weights(expert, config.initializer_range)
    if config.dtype is not None:
        expert.to(config.dtype)
    width = text.num_key_value_heads * text.head_dim
    layers: list[Any] = list(expert.layers)
    for layer, cross in zip(layers, crosses, strict=True):
        if cross:
            layer.self_attn.k_proj = nn.Linear(width, width, bias=config.attention_bias)
            layer.self_attn.v_proj = nn.Linear(width, width, bias=config.attention_bias)
    return expert
