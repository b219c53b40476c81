"""What callers below ``sample_actions`` call, in any release: a prefix, its cache, a suffix, single layers."""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolvla_fast.layers import caches
from smolvla_fast.ops.reference.masks import block_mask

from .policies import model_inputs


class Given(NamedTuple):
    """Embeddings, masks and positions of a policy on one observation, made by stock.

    prefix [B, P, M]      suffix [B, S, E]      pads, blocks  of the prefix, [B, P]
    """

    prefix: Tensor
    suffix: Tensor
    pads: Tensor
    blocks: Tensor
    x: Tensor
    time: Tensor

    @property
    def prefix_call(self) -> tuple[Tensor, Tensor]:
        """Positions and mask of the prefix alone."""
        return torch.cumsum(self.pads, dim=1) - 1, block_mask(self.pads, self.blocks)

    @property
    def suffix_call(self) -> tuple[Tensor, Tensor]:
        """Of the suffix behind a cache."""
        positions, mask = self.joint_call
        start = self.prefix.shape[1]
        return positions[:, start:], mask[:, start:]

    @property
    def joint_call(self) -> tuple[Tensor, Tensor]:
        """Of both together, as in training."""
        ones = self.pads.new_ones(self.suffix.shape[:2])
        pads, blocks = torch.cat([self.pads, ones], 1), torch.cat([self.blocks, ones], 1)
        return torch.cumsum(pads, dim=1) - 1, block_mask(pads, blocks)


def given(policy: Any, observation: dict[str, Tensor], noise: Tensor, time: float = 0.7) -> Given:
    model = policy.model
    times = torch.full((len(noise),), time)
    with torch.no_grad():
        *rest, state = model_inputs(policy, observation)
        prefix, pads, blocks = model.embed_prefix(*rest, state=state)
        suffix = model.embed_suffix(noise, times)[0]
    return Given(prefix, suffix, pads, blocks.bool(), noise, times)


def forward(
    pair: Any, call: tuple[Tensor, Tensor], inputs: list[Any], cache: Any = None, fill: bool = False
) -> Any:
    """``pair.forward`` of any release."""
    more = {"fill_kv_cache": fill} if "fill_kv_cache" in signature(pair.forward).parameters else {}
    return pair.forward(
        attention_mask=call[1], position_ids=call[0], past_key_values=cache, inputs_embeds=inputs,
        use_cache=fill or cache is not None, **more,
    )  # fmt: skip


def one_layer(
    pair: Any, name: str, depth: int, call: tuple[Tensor, Tensor], inputs: list[Any], cache: Any = None, fill: bool = False
) -> Any:  # fmt: skip
    """``forward_attn_layer`` or ``forward_cross_attn_layer`` of any release; its first result."""
    method = getattr(pair, name)
    more = {"fill_kv_cache": fill} if "fill_kv_cache" in signature(method).parameters else {}
    layers = pair.get_model_layers([pair.get_vlm_model().text_model, pair.lm_expert])
    batch, head_dim = len(call[0]), pair.get_vlm_model().text_model.layers[0].self_attn.head_dim
    found, _ = method(
        layers, inputs, depth, call[0], call[1], batch, head_dim,
        use_cache=cache is not None, past_key_values=cache, **more,
    )  # fmt: skip
    return found


def contents(cache: Any, layers: int) -> list[Tensor]:
    return [each.clone() for i in range(layers) for each in caches.read(cache, i)]
