"""The sizes of one model, read from its modules, under the letters that code and docs use for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PairDims:
    """Sizes of the VLM and its expert. The letters are those of the README."""

    layers: int
    """L: text layers, and expert layers as well"""
    query_heads: int
    """H"""
    kv_heads: int
    """K"""
    head_dim: int
    """D"""
    text_width: int
    """M"""
    expert_width: int
    """E"""
    vision_heads: int
    image_side: int
    """pixels; the vision tower was built for square images of this side"""
    patch: int
    """pixels"""
    shuffle: int
    """pixel-shuffle factor of the connector"""

    @property
    def image_tokens(self) -> int:
        """Prefix tokens of one camera."""
        return (self.image_side // self.patch // self.shuffle) ** 2


@dataclass(frozen=True)
class Dims(PairDims):
    """Sizes of a SmolVLA."""

    action_width: int
    """A: padded action size"""
    state_width: int
    """R: padded state size"""
    chunk: int
    """S: actions in a chunk"""


def read_pair_dims(pair: Any, kind: type = PairDims, **more: int) -> Any:
    """Sizes of a ``SmolVLMWithExpertModel`` (LeRobot's or ours), from its live modules."""
    vlm, expert = pair.get_vlm_model(), pair.lm_expert
    embeddings = vlm.vision_model.embeddings
    attention = vlm.text_model.layers[0].self_attn
    return kind(
        layers=len(vlm.text_model.layers),
        query_heads=pair.num_attention_heads,
        kv_heads=pair.num_key_value_heads,
        head_dim=attention.head_dim,
        text_width=attention.q_proj.weight.shape[1],
        expert_width=expert.norm.weight.shape[0],
        vision_heads=vlm.vision_model.encoder.layers[0].self_attn.num_heads,
        image_side=embeddings.image_size,
        patch=embeddings.patch_size,
        shuffle=vlm.connector.scale_factor,
        **more,
    )


def read_dims(model: Any) -> Dims:
    """Sizes of a ``VLAFlowMatching`` (LeRobot's or ours), from its live modules."""
    return read_pair_dims(
        model.vlm_with_expert,
        Dims,
        action_width=model.action_in_proj.weight.shape[1],
        state_width=model.state_proj.weight.shape[1],
        chunk=model.config.chunk_size,
    )
