"""Weights like the worst of trained models: heavy tails, outlier channels, attention to a single token.

They are hard for narrow tiers, which normal weights would flatter: int8 gives all values of a row one step, and bf16 keeps
eight bits of a large score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smolvla_fast.model.weights import is_cross

DEGREES = 4
"""Degrees of freedom of Student's t: variance is finite, the fourth moment is not."""
OUTLIER = 50.0
"""Factor of an outlier channel."""
OUTLIER_STRIDE = 200
"""A norm has one outlier in so many channels, at least one: about the share reported of trained language models."""


@contextmanager
def heavy_tailed(model: Any, seed: int = 0, degrees: int = DEGREES) -> Iterator[None]:
    """Gives a ``VLAFlowMatching`` heavy tails and outliers; restores every bit on exit.

    Matrices of vision, text and expert layers become Student's t of the same variance. A few channels of each norm grow by
    ``OUTLIER``, and the weights that read them shrink as much, so the function stays the same.

    degrees  of freedom of Student's t; ValueError below 3, where it has no variance
    """
    if degrees < 3:
        raise ValueError(f"degrees={degrees}: Student's t has a variance to keep from 3 degrees on")
    with _changed(model, lambda generator: _tails_and_outliers(model, generator, degrees), seed):
        yield


@contextmanager
def sharp_attention(model: Any, seed: int = 0, factor: float = OUTLIER) -> Iterator[None]:
    """Scales one channel of every query head by ``factor``, so that softmax is nearly one-hot; restores it on exit."""
    with _changed(model, lambda generator: _sharpen(model, generator, factor), seed):
        yield


@contextmanager
def _changed(model: Any, change: Callable[[torch.Generator], None], seed: int) -> Iterator[None]:
    saved = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        with torch.no_grad():
            change(torch.Generator().manual_seed(seed))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), saved, strict=True):
                parameter.copy_(before)


def _sharpen(model: Any, generator: torch.Generator, factor: float) -> None:
    pair = model.vlm_with_expert
    vlm = pair.get_vlm_model()
    for layer in (*vlm.vision_model.encoder.layers, *vlm.text_model.layers, *pair.lm_expert.layers):
        query, size = layer.self_attn.q_proj, layer.self_attn.head_dim
        heads = torch.arange(0, query.weight.shape[0], size)
        chosen = heads + torch.randint(size, heads.shape, generator=generator)
        query.weight[chosen] *= factor
        if query.bias is not None:
            query.bias[chosen] *= factor


def _tails_and_outliers(model: Any, generator: torch.Generator, degrees: int) -> None:
    pair = model.vlm_with_expert
    vlm = pair.get_vlm_model()
    for layer in vlm.vision_model.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _tails([*attention.children(), *mlp.children()], generator, degrees)
        _outliers(layer.layer_norm1, [attention.q_proj, attention.k_proj, attention.v_proj], generator)
        _outliers(layer.layer_norm2, [mlp.fc1], generator)
    text = [(layer, False) for layer in vlm.text_model.layers]
    expert = [(layer, is_cross(pair, i)) for i, layer in enumerate(pair.lm_expert.layers)]
    for layer, cross in text + expert:
        attention, mlp = layer.self_attn, layer.mlp
        _tails([*attention.children(), *mlp.children()], generator, degrees)
        # A cross layer of the expert makes its keys and values from the prefix, not from this norm.
        readers = [attention.q_proj, *([] if cross else [attention.k_proj, attention.v_proj])]
        _outliers(layer.input_layernorm, readers, generator)
        _outliers(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], generator)


def _tails(modules: list[Any], generator: torch.Generator, degrees: int) -> None:
    """Normal entries over the root of an independent chi-squared variable: Student's t, here of the old variance."""
    for module in modules:
        if isinstance(module, nn.Linear):
            # Exponential of mean 2 is chi-squared of 2 degrees, the square of a normal variable of 1.
            squares = torch.zeros_like(module.weight)
            for _ in range(degrees // 2):
                squares += torch.empty_like(squares).exponential_(0.5, generator=generator)
            if degrees % 2:
                squares += torch.empty_like(squares).normal_(generator=generator).square_()
            module.weight.mul_(math.sqrt(degrees - 2)).div_(squares.sqrt_())


def _outliers(norm: Any, readers: list[Any], generator: torch.Generator) -> None:
    width = norm.weight.shape[0]
    chosen: Tensor = torch.randperm(width, generator=generator)[: max(1, width // OUTLIER_STRIDE)]
    norm.weight[chosen] *= OUTLIER
    if getattr(norm, "bias", None) is not None:
        norm.bias[chosen] *= OUTLIER
    for reader in readers:
        reader.weight[:, chosen] /= OUTLIER
