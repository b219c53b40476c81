"""Weights as trained models have them at worst: entries far out in the tails, and channels far larger than the rest.

Quantisation to 8 bits gives all values of a row one step, so both are what it suffers from; normal weights would flatter it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smolvla_fast.weights import is_cross

FREEDOM = 4
"""Degrees of freedom of Student's t: variance is finite, the fourth moment is not."""
OUTLIER = 50.0
"""How much larger an outlier channel of a norm is."""
EVERY = 200
"""One channel in so many is an outlier (at least one a norm), about what is reported of trained language models."""


@contextmanager
def heavy_tailed(model: Any, seed: int = 0) -> Iterator[None]:
    """Inside, a ``VLAFlowMatching`` has tails and outliers; afterwards every bit is what it was.

    Matrices of vision, text and expert layers become Student's t of the same variance. A few channels of each norm grow
    fifty-fold, and what reads them shrinks as much, so that the function is an ordinary one and only its numbers are not.
    """
    saved = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        with torch.no_grad():
            _change(model, torch.Generator().manual_seed(seed))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), saved, strict=True):
                parameter.copy_(before)


def _change(model: Any, generator: torch.Generator) -> None:
    pair = model.vlm_with_expert
    vlm = pair.get_vlm_model()
    for layer in vlm.vision_model.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _tails([*attention.children(), *mlp.children()], generator)
        _outliers(layer.layer_norm1, [attention.q_proj, attention.k_proj, attention.v_proj], generator)
        _outliers(layer.layer_norm2, [mlp.fc1], generator)
    text = [(layer, False) for layer in vlm.text_model.layers]
    expert = [(layer, is_cross(pair, i)) for i, layer in enumerate(pair.lm_expert.layers)]
    for layer, cross in text + expert:
        attention, mlp = layer.self_attn, layer.mlp
        _tails([*attention.children(), *mlp.children()], generator)
        # A cross layer of the expert makes its keys and values from the prefix, not from this norm.
        readers = [attention.q_proj, *([] if cross else [attention.k_proj, attention.v_proj])]
        _outliers(layer.input_layernorm, readers, generator)
        _outliers(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], generator)


def _tails(modules: list[Any], generator: torch.Generator) -> None:
    """Normal entries over the root of an independent chi-squared variable: Student's t, here of the old variance."""
    for module in modules:
        if isinstance(module, nn.Linear):
            # Two exponential variables of mean 2 are chi-squared of 4 degrees.
            squares, more = (
                torch.empty_like(module.weight).exponential_(0.5, generator=generator) for _ in "12"
            )
            squares += more
            module.weight.mul_(math.sqrt(FREEDOM - 2)).div_(squares.sqrt_())


def _outliers(norm: Any, readers: list[Any], generator: torch.Generator) -> None:
    width = norm.weight.shape[0]
    chosen: Tensor = torch.randperm(width, generator=generator)[: max(1, width // EVERY)]
    norm.weight[chosen] *= OUTLIER
    if getattr(norm, "bias", None) is not None:
        norm.bias[chosen] *= OUTLIER
    for reader in readers:
        reader.weight[:, chosen] /= OUTLIER
