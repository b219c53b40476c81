"""The VLM and the action expert, run layer by layer side by side (SmolVLA, arXiv 2506.01844, section 3).

Two kinds of expert layers alternate. In a *self-attention* layer the expert's tokens attend to the VLM's keys and
values and to their own; in a *cross-attention* layer they attend to the VLM's keys and values alone, passed through
the expert's own ``k_proj`` and ``v_proj``. Every ``self_attn_every_n_layers``-th layer is of the first kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.reference.masked_attention import masked_attention
from ..ops.reference.rope import apply_rope, rope_tables
from .build_pair import build_expert, build_vlm, get_intermediate_size
from .hub import CONFIG_NAME, find_file
from .joint_layers import Layers, finish_layer, project_cached, project_qkv
from .kv_cache import KVCache
from .smolvlm import LlamaModel, SmolVLMModel
from .vlm_config import LlamaConfig, SmolVLMConfig

ATTENTION_MODES = ("cross_attn", "self_attn")


class SmolVLMWithExpertModel(nn.Module):
    """The backbone cut to its first layers, and an expert of the same depth or a divisor of it.

    model_id                  folder or Hub id of the SmolVLM backbone
    load_vlm_weights          True: start from the backbone's weights, held in bf16. False: random, in the dtype that
                              the backbone's config names for each part (fp32 if none); a policy checkpoint fills them
    num_vlm_layers            layers kept, all if <= 0
    num_expert_layers         layers of the expert, as many as the VLM's if <= 0; must divide that number
    self_attn_every_n_layers  <= 0: every expert layer is a cross-attention layer
    expert_width_multiplier   hidden size of the expert relative to the VLM's
    attention_mode            "cross_attn" | "self_attn" (no cross-attention layers at all)

    Class, methods and state_dict keys are LeRobot's. Dtypes may be mixed: each projection casts its input to its own.
    """

    def __init__(
        self,
        model_id: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        load_vlm_weights: bool = True,
        train_expert_only: bool = True,
        freeze_vision_encoder: bool = False,
        attention_mode: str = "self_attn",
        num_expert_layers: int = -1,
        num_vlm_layers: int = -1,
        self_attn_every_n_layers: int = -1,
        expert_width_multiplier: float = 0.5,
        device: str = "auto",
    ):
        super().__init__()
        if attention_mode not in ATTENTION_MODES:
            raise ValueError(f"attention_mode {attention_mode!r} is not one of {ATTENTION_MODES}")
        self.model_id = model_id
        self.config = SmolVLMConfig.from_file(find_file(model_id, CONFIG_NAME))
        text = self.config.text_config
        # Only the layers that are kept get built; the config keeps saying how many the backbone has.
        kept = min(num_vlm_layers, text.num_hidden_layers) if num_vlm_layers > 0 else text.num_hidden_layers
        self.vlm = build_vlm(self.config, model_id, kept, load_vlm_weights)
        self.num_vlm_layers = kept

        self.attention_mode = attention_mode
        self.self_attn_every_n_layers = self_attn_every_n_layers
        self.num_expert_layers = num_expert_layers if num_expert_layers > 0 else kept
        if kept % self.num_expert_layers:
            raise ValueError(
                f"num_expert_layers ({num_expert_layers}) must divide the number of VLM layers ({kept})"
            )
        crosses = [not self._is_self_attention(index) for index in range(self.num_expert_layers)]
        self.lm_expert = build_expert(text, expert_width_multiplier, crosses)
        self.expert_hidden_size = self.lm_expert.config.hidden_size
        self._check_interleaving()

        self.num_attention_heads = text.num_attention_heads
        self.num_key_value_heads = text.num_key_value_heads
        self.freeze_vision_encoder = freeze_vision_encoder
        self.train_expert_only = train_expert_only
        self._processor: Any = None
        self.set_requires_grad()

    def _is_self_attention(self, layer_idx: int) -> bool:
        every = self.self_attn_every_n_layers
        return "cross" not in self.attention_mode or (every > 0 and layer_idx % every == 0)

    def _check_interleaving(self) -> None:
        """An expert with fewer layers is spread over the VLM's; the kind of each layer must match where it lands."""
        experts = self.get_model_layers([self.get_vlm_model().text_model, self.lm_expert])[1]
        text = self.config.text_config
        for index, layer in enumerate(experts):
            if layer is None:
                continue
            own = self._is_self_attention(index)
            width = self.expert_hidden_size if own else text.num_key_value_heads * text.head_dim
            if layer.self_attn.k_proj.in_features != width:
                kind = "self" if own else "cross"
                raise ValueError(
                    f"num_expert_layers={self.num_expert_layers} and "
                    f"self_attn_every_n_layers={self.self_attn_every_n_layers} do not go together: an expert layer "
                    f"built for the other kind of attention would serve as {kind}-attention layer {index} of "
                    f"{self.num_vlm_layers}. Use as many expert as VLM layers, or self_attn_every_n_layers=0"
                )

    @property
    def processor(self) -> Any:
        """transformers' processor of the backbone (tokenizer, image processor), loaded on first use."""
        if self._processor is None:
            from transformers import AutoProcessor

            self._processor = AutoProcessor.from_pretrained(self.model_id)
        return self._processor

    def get_vlm_model(self) -> SmolVLMModel:
        return self.vlm.model

    def set_requires_grad(self) -> None:
        """Freeze what the settings say; parameters that get no gradient anyway are frozen too (DDP demands it)."""
        if self.freeze_vision_encoder:
            self.get_vlm_model().vision_model.eval().requires_grad_(False)
        if self.train_expert_only:
            self.vlm.eval().requires_grad_(False)
            return
        # The prefix leaves only keys and values behind: what the last layers compute after them is never
        # used.
        last = [self.num_vlm_layers - 1]
        if (
            self.num_vlm_layers != self.num_expert_layers
            and self.num_vlm_layers % self.num_expert_layers == 0
        ):
            last.append(self.num_vlm_layers - 2)
        frozen = ("lm_head", "text_model.norm.weight", *(f"text_model.layers.{index}." for index in last))
        for name, parameter in self.vlm.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad = False

    def train(self, mode: bool = True) -> SmolVLMWithExpertModel:
        """As ``nn.Module.train``, but frozen parts stay in evaluation mode."""
        super().train(mode)
        if self.freeze_vision_encoder:
            self.get_vlm_model().vision_model.eval()
        if self.train_expert_only:
            self.vlm.eval()
        return self

    def embed_image(self, image: Tensor) -> Tensor:
        """[B, 3, h, w] in [-1, 1] to [B, image tokens, M] in the vision tower's dtype."""
        model = self.get_vlm_model()
        hidden = model.vision_model(pixel_values=image.to(dtype=model.vision_model.dtype)).last_hidden_state
        return model.connector(hidden)

    def embed_language_tokens(self, tokens: Tensor) -> Tensor:
        """[B, T] token ids to [B, T, M]."""
        embed = self.get_vlm_model().text_model.get_input_embeddings()
        assert embed is not None
        return embed(tokens)

    def forward_attn_layer(
        self,
        model_layers: Layers,
        inputs_embeds: list[Tensor | None],
        layer_idx: int,
        position_ids: Tensor,
        attention_mask: Tensor,
        batch_size: int,
        head_dim: int,
        use_cache: bool = True,
        past_key_values: KVCache | None = None,
    ) -> tuple[list[Tensor], KVCache | None]:
        """Joint attention of all streams present (VLM, expert), each with its own projections.

        Returns one tensor [B, all tokens, H·D] in a list, and the cache with this layer's keys and values appended.
        """
        projected = []
        for layers, hidden in zip(model_layers, inputs_embeds, strict=True):
            layer = layers[layer_idx]
            if hidden is not None and layer is not None:
                projected.append(project_qkv(layer, hidden))
        if not projected:
            raise ValueError(
                f"self-attention layer {layer_idx} has no expert layer: "
                f"num_expert_layers={self.num_expert_layers} of "
                f"{self.num_vlm_layers} can be trained with attention_mode={self.attention_mode!r} and "
                f"self_attn_every_n_layers={self.self_attn_every_n_layers}, but not sampled from"
            )
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*projected, strict=True))
        tokens = q.shape[1]
        if tokens < position_ids.shape[1]:
            # A stream without a layer here: what remains are the first tokens.
            position_ids = position_ids[:, :tokens]
            attention_mask = attention_mask[:, :tokens, :tokens]
        sin, cos = rope_tables(position_ids, head_dim)
        q, k = apply_rope(q, sin, cos), apply_rope(k, sin, cos)
        if use_cache:
            assert past_key_values is not None
            k, v = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return [self.eager_attention_forward(attention_mask, batch_size, head_dim, q, k, v)], past_key_values

    def forward_cross_attn_layer(
        self,
        model_layers: Layers,
        inputs_embeds: list[Tensor | None],
        layer_idx: int,
        position_ids: Tensor,
        attention_mask: Tensor,
        batch_size: int,
        head_dim: int,
        use_cache: bool = True,
        past_key_values: KVCache | None = None,
    ) -> tuple[list[Tensor | None], KVCache | None]:
        """The VLM attends to itself (training) or is read from the cache; the expert attends to its keys and values.

        Returns [VLM output] if it was computed here, then the expert's [B, S, H·D] or None where it has no layer.
        """
        outputs: list[Tensor | None] = []
        prefix, suffix = inputs_embeds
        if past_key_values is None:
            if prefix is None or suffix is None:
                raise ValueError(
                    "a cross-attention layer without a cache needs both the VLM's and the expert's input"
                )
            layer = model_layers[0][layer_idx]
            assert layer is not None
            tokens = prefix.shape[1]
            positions, expert_positions = position_ids[:, :tokens], position_ids[:, tokens:]
            q, k, v = project_qkv(layer, prefix)
            sin, cos = rope_tables(positions, head_dim)
            q, k = apply_rope(q, sin, cos), apply_rope(k, sin, cos)
            mask = attention_mask[:, :tokens, :tokens]
            outputs.append(self.eager_attention_forward(mask, batch_size, head_dim, q, k, v))
        else:
            # Filled by the prefill, in which every layer is a self-attention layer.
            cached = past_key_values.layers[layer_idx]
            k, v = cached.keys.transpose(1, 2), cached.values.transpose(1, 2)
            expert_positions = position_ids

        expert = model_layers[1][layer_idx]
        if expert is None:
            outputs.append(None)
            return outputs, past_key_values
        assert suffix is not None
        attention = expert.self_attn
        hidden = expert.input_layernorm(suffix).to(attention.q_proj.weight.dtype)
        q = attention.q_proj(hidden).view(*hidden.shape[:-1], -1, attention.head_dim)
        k = project_cached(attention.k_proj, k, attention.head_dim)
        v = project_cached(attention.v_proj, v, attention.head_dim)
        # In these layers the expert's positions count from 0.
        sin, cos = rope_tables(expert_positions - expert_positions.amin(dim=1, keepdim=True), head_dim)
        mask = attention_mask[:, -suffix.shape[1] :, : k.shape[1]]
        outputs.append(
            self.eager_attention_forward(mask, batch_size, head_dim, apply_rope(q, sin, cos), k, v)
        )
        return outputs, past_key_values

    def get_model_layers(self, models: list[LlamaModel]) -> Layers:
        """[VLM layers, expert layers], both as long as the VLM; None where the expert sits out."""
        vlm, expert = models
        spread = self.num_vlm_layers // self.num_expert_layers
        experts = [
            None if index % spread else expert.layers[index // spread] for index in range(self.num_vlm_layers)
        ]
        return [list(vlm.layers), experts]

    def forward(
        self,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: list[Tensor | None] | None = None,
        use_cache: bool | None = None,
    ) -> tuple[list[Tensor | None], KVCache | None]:
        """Run all layers over [prefix, suffix], either of which may be None.

        inputs_embeds    [[B, P, M] or None, [B, S, E] or None]
        attention_mask   [B, queries, keys]  bool           position_ids  [B, queries]
        use_cache        True without past_key_values: prefill, fills a new cache; with it: denoising, reads it
        returns          final hidden states, None for absent streams, and the cache
        """
        assert inputs_embeds is not None and attention_mask is not None and position_ids is not None
        models = [self.get_vlm_model().text_model, self.lm_expert]
        model_layers = self.get_model_layers(models)
        batch_size = next(hidden.shape[0] for hidden in inputs_embeds if hidden is not None)
        head_dim = self.config.text_config.head_dim
        prefill = bool(use_cache) and past_key_values is None
        if prefill:
            past_key_values = KVCache()

        for layer_idx in range(self.num_vlm_layers):
            own = prefill or self._is_self_attention(layer_idx)
            attend = self.forward_attn_layer if own else self.forward_cross_attn_layer
            attended, past_key_values = attend(
                model_layers, inputs_embeds, layer_idx, position_ids, attention_mask, batch_size, head_dim,
                use_cache=bool(use_cache), past_key_values=past_key_values,
            )  # fmt: skip
            inputs_embeds = finish_layer(model_layers, inputs_embeds, layer_idx, attended)

        normed = [
            None if hidden is None else model.norm(hidden)
            for model, hidden in zip(models, inputs_embeds, strict=True)
        ]
        return normed, past_key_values

    def get_attention_interface(self) -> Any:
        return self.eager_attention_forward

    def eager_attention_forward(
        self,
        attention_mask: Tensor,
        batch_size: int,
        head_dim: int,
        query_states: Tensor,
        key_states: Tensor,
        value_states: Tensor,
    ) -> Tensor:
        """``reference.masked_attention`` under LeRobot's signature."""
        return masked_attention(query_states, key_states, value_states, attention_mask)


__all__ = ["KVCache", "LlamaConfig", "SmolVLMConfig", "SmolVLMWithExpertModel", "get_intermediate_size"]
