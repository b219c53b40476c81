"""VLAFlowMatching: observation and noise in, velocity, loss or action chunk out."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.reference.image_prep import image_prep
from ..ops.reference.masks import block_mask
from ..ops.reference.time_embedding import time_embedding
from .configuration_smolvla import SmolVLAConfig
from .flow_matching import euler_integrate, sample_noise, sample_time
from .kv_cache import KVCache
from .rtc import RTCProcessor
from .smolvlm_with_expert import SmolVLMWithExpertModel

_SAMPLING_ARGUMENTS = ("inference_delay", "prev_chunk_left_over", "execution_horizon")


def pad_tensor(tensor: Tensor, max_len: int, pad_value: float = 0) -> Tensor:
    """[B, T, ...] extended with ``pad_value`` to [B, max_len, ...]."""
    padded = tensor.new_full((tensor.shape[0], max_len, *tensor.shape[2:]), pad_value)
    padded[:, : tensor.shape[1]] = tensor
    return padded


class VLAFlowMatching(nn.Module):
    """The model of SmolVLA: prefix [images | language | state] through the VLM, noisy actions through the expert.

    Training regresses ``v = noise - actions`` at ``x_t = t·noise + (1-t)·actions``; sampling integrates ``v`` from
    noise at t = 1 to actions at t = 0. Corresponds to LeRobot's class of the same name.

    takes_bytes  images may be uint8 frames of any size; LeRobot's class gives bytes no meaning
    """

    takes_bytes = True

    def __init__(self, config: SmolVLAConfig, rtc_processor: RTCProcessor | None = None):
        super().__init__()
        self.config = config
        self.vlm_with_expert = SmolVLMWithExpertModel(
            model_id=config.vlm_model_name, load_vlm_weights=config.load_vlm_weights,
            train_expert_only=config.train_expert_only, freeze_vision_encoder=config.freeze_vision_encoder,
            attention_mode=config.attention_mode, num_expert_layers=config.num_expert_layers,
            num_vlm_layers=config.num_vlm_layers, self_attn_every_n_layers=config.self_attn_every_n_layers,
            expert_width_multiplier=config.expert_width_multiplier,
        )  # fmt: skip
        hidden, width = (
            self.vlm_with_expert.config.text_config.hidden_size,
            self.vlm_with_expert.expert_hidden_size,
        )
        self.state_proj = nn.Linear(config.max_state_dim, hidden)
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        self.action_time_mlp_in = nn.Linear(width * 2, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.set_requires_grad()

        self.add_image_special_tokens = config.add_image_special_tokens
        self.prefix_length = config.prefix_length
        self.rtc_processor = rtc_processor
        self._special_tokens: dict[str, int] | None = None
        if config.compile_model:
            # Unlike LeRobot, the process-wide matmul precision is left alone.
            self.sample_actions = torch.compile(self.sample_actions, mode=config.compile_mode)  # type: ignore[method-assign]
            self.forward = torch.compile(self.forward, mode=config.compile_mode)  # type: ignore[method-assign]

    def _token_id(self, name: str, token: str) -> int:
        if self._special_tokens is None:
            self._special_tokens = {}
        if name not in self._special_tokens:
            # Only the tokenizer is needed, and only for models that use these tokens.
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.vlm_with_expert.model_id)
            index = getattr(tokenizer, name, None)
            index = tokenizer.convert_tokens_to_ids(token) if index is None else index
            if not isinstance(index, int) or index == tokenizer.unk_token_id:
                raise ValueError(f"the tokenizer of {self.vlm_with_expert.model_id!r} has no token {token!r}")
            self._special_tokens[name] = index
        return self._special_tokens[name]

    @property
    def fake_image_token(self) -> int:
        return self._token_id("fake_image_token_id", "<fake_token_around_image>")

    @property
    def global_image_token(self) -> int:
        return self._token_id("global_image_token_id", "<global-img>")

    @property
    def global_image_start_token(self) -> Tensor:
        """The two tokens in front of an image, [2] int64."""
        return torch.tensor([self.fake_image_token, self.global_image_token], dtype=torch.long)

    @property
    def image_end_token(self) -> Tensor:
        """The token behind an image, [1] int64."""
        return torch.tensor([self.fake_image_token], dtype=torch.long)

    def _rtc_enabled(self) -> bool:
        return self.config.rtc_config is not None and self.config.rtc_config.enabled

    def set_requires_grad(self) -> None:
        self.state_proj.requires_grad_(self.config.train_state_proj)

    def sample_noise(self, shape: Any, device: torch.device | str) -> Tensor:
        """Standard normal fp32 from the device's default generator."""
        return sample_noise(shape, device)

    def sample_time(self, bsize: int, device: torch.device | str) -> Tensor:
        """[B] fp32, ``0.999 · Beta(1.5, 1) + 0.001``."""
        return sample_time(bsize, device)

    def _embed_special(self, tokens: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Embeddings [B, n, M] of special tokens, unscaled, and their mask [B, n]."""
        embedded = self.vlm_with_expert.embed_language_tokens(tokens.to(self.vlm_with_expert.vlm.device))
        embedded = embedded.unsqueeze(0).expand(batch, -1, -1)
        return embedded, torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)

    def embed_prefix(
        self,
        images: list[Tensor],
        img_masks: list[Tensor],
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The prefix of the sequence: every camera's tokens, the task, one token of state.

        images   C tensors [B, 3, h, w] in [-1, 1], or   img_masks   C tensors [B] bool, False for an absent
                 uint8 frames                                        camera
        lang_tokens, lang_masks  [B, T] int64 and bool   state       [B, max_state_dim]
        returns  embeddings [B, P, M], pad mask [B, P] bool, block starts [B, P] bool (True at the state: images and
                 language do not see it). P is at least ``prefix_length``.
        """
        parts: list[tuple[Tensor, Tensor]] = []
        side = self.vlm_with_expert.get_vlm_model().vision_model.embeddings.image_size
        for image, mask in zip(images, img_masks, strict=True):
            if image.dtype is torch.uint8:
                image = image_prep(image, side, side, torch.float32)
            if self.add_image_special_tokens:
                parts.append(self._embed_special(self.global_image_start_token, image.shape[0]))
            embedded = self.vlm_with_expert.embed_image(image)
            # The factor is rounded to the embedding's dtype before it multiplies.
            scale = torch.tensor(embedded.shape[-1] ** 0.5, dtype=embedded.dtype, device=embedded.device)
            parts.append((embedded * scale, mask[:, None].expand(embedded.shape[:2])))
            if self.add_image_special_tokens:
                parts.append(self._embed_special(self.image_end_token, image.shape[0]))
        language = self.vlm_with_expert.embed_language_tokens(lang_tokens)
        parts.append((language * math.sqrt(language.shape[-1]), lang_masks))
        unseen = sum(part.shape[1] for part, _ in parts)

        state_emb = self.state_proj(state)
        state_emb = state_emb[:, None, :] if state_emb.ndim == 2 else state_emb
        parts.append((state_emb, torch.ones(state_emb.shape[:2], dtype=torch.bool, device=state_emb.device)))

        embs = torch.cat([part for part, _ in parts], dim=1)
        pad_masks = torch.cat([mask for _, mask in parts], dim=1)
        att_masks = torch.zeros_like(pad_masks[:1])
        att_masks[:, unseen:] = True
        if pad_masks.shape[1] < self.prefix_length:
            embs, pad_masks, att_masks = (
                pad_tensor(x, self.prefix_length) for x in (embs, pad_masks, att_masks)
            )
        return embs, pad_masks, att_masks.expand(state_emb.shape[0], -1)

    def embed_suffix(self, noisy_actions: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token per action: ``mlp_out(silu(mlp_in([action_in(x), time_emb(t)])))``.

        noisy_actions  [B, S, max_action_dim]      timestep  [B] fp32 in [0, 1]
        returns        embeddings [B, S, E], pad mask [B, S] (all True), block starts [B, S] (all 1: causal)
        """
        action = self.action_in_proj(noisy_actions)
        width = self.vlm_with_expert.expert_hidden_size
        time = time_embedding(timestep, width, self.config.min_period, self.config.max_period).type(
            action.dtype
        )
        joined = torch.cat([action, time[:, None, :].expand_as(action)], dim=2)
        embs = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(joined)))
        pad_masks = torch.ones(embs.shape[:2], dtype=torch.bool, device=embs.device)
        att_masks = torch.ones(1, self.config.chunk_size, dtype=embs.dtype, device=embs.device)
        return embs, pad_masks, att_masks.expand(embs.shape[0], -1)

    def _velocity(self, hidden: Tensor) -> Tensor:
        return self.action_out_proj(hidden[:, -self.config.chunk_size :].to(torch.float32))

    def forward(
        self,
        images: list[Tensor],
        img_masks: list[Tensor],
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
        actions: Tensor,
        noise: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """Squared error of the velocity, [B, chunk_size, max_action_dim], unreduced; noise and time are drawn if
        None.

        actions  [B, chunk_size, max_action_dim]     noise  the same shape     time  [B]
        """
        if actions.shape[1] != self.config.chunk_size:
            raise ValueError(
                f"'action' must hold chunk_size={self.config.chunk_size} steps, got {actions.shape[1]}"
            )
        if noise is None:
            noise = self.sample_noise(actions.shape, actions.device)
        if time is None:
            time = self.sample_time(actions.shape[0], actions.device)
        t = time[:, None, None]
        x_t = t * noise + (1 - t) * actions

        prefix, prefix_pad, prefix_att = self.embed_prefix(images, img_masks, lang_tokens, lang_masks, state)
        suffix, suffix_pad, suffix_att = self.embed_suffix(x_t, time)
        pad_masks = torch.cat([prefix_pad, suffix_pad], dim=1)
        (_, hidden), _ = self.vlm_with_expert.forward(
            attention_mask=block_mask(pad_masks, torch.cat([prefix_att, suffix_att], dim=1)),
            position_ids=torch.cumsum(pad_masks, dim=1) - 1,
            inputs_embeds=[prefix, suffix],
            use_cache=False,
        )
        assert hidden is not None
        return F.mse_loss(noise - actions, self._velocity(hidden), reduction="none")

    def sample_actions(
        self,
        images: list[Tensor],
        img_masks: list[Tensor],
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Integrate from noise to an action chunk [B, chunk_size, max_action_dim] fp32.

        The first five arguments are those of ``embed_prefix``; noise has the chunk's shape and is drawn if None.
        kwargs  inference_delay, prev_chunk_left_over, execution_horizon, see ``RTCProcessor.denoise_step``
        """
        unknown = sorted(set(kwargs) - set(_SAMPLING_ARGUMENTS))
        if unknown:
            raise TypeError(
                f"sample_actions got unexpected arguments {unknown}; accepted are {_SAMPLING_ARGUMENTS}"
            )
        if not self.config.use_cache:
            raise ValueError(
                "config.use_cache=False can train only: sampling needs the prefix's keys and values"
            )
        shape = (state.shape[0], self.config.chunk_size, self.config.max_action_dim)
        if noise is None:
            noise = self.sample_noise(shape, state.device)
        elif tuple(noise.shape) != shape:
            raise ValueError(
                f"noise must have shape {shape} (batch, chunk_size, max_action_dim), got {tuple(noise.shape)}"
            )

        prefix, pad_masks, att_masks = self.embed_prefix(images, img_masks, lang_tokens, lang_masks, state)
        _, cache = self.vlm_with_expert.forward(
            attention_mask=block_mask(pad_masks, att_masks),
            position_ids=torch.cumsum(pad_masks, dim=1) - 1,
            inputs_embeds=[prefix, None],
            use_cache=True,
        )
        return euler_integrate(
            lambda x_t, timestep: self.denoise_step(
                x_t=x_t, prefix_pad_masks=pad_masks, past_key_values=cache, timestep=timestep
            ),
            noise,
            self.config.num_steps,
            rtc_processor=self.rtc_processor,
            rtc_enabled=self._rtc_enabled(),
            **kwargs,
        )

    def denoise_step(
        self, prefix_pad_masks: Tensor, past_key_values: KVCache | None, x_t: Tensor, timestep: Tensor
    ) -> Tensor:
        """The velocity [B, S, max_action_dim] fp32 at ``x_t`` and ``timestep`` [B]; leaves the cache as it was."""
        suffix, suffix_pad, suffix_att = self.embed_suffix(x_t, timestep)
        prefix_len = prefix_pad_masks.shape[1]
        to_prefix = prefix_pad_masks[:, None, :].expand(-1, suffix_pad.shape[1], -1)
        outputs, _ = self.vlm_with_expert.forward(
            attention_mask=torch.cat([to_prefix, block_mask(suffix_pad, suffix_att)], dim=2),
            position_ids=prefix_pad_masks.sum(dim=-1)[:, None] + torch.cumsum(suffix_pad, dim=1) - 1,
            past_key_values=past_key_values,
            inputs_embeds=[None, suffix],
            use_cache=self.config.use_cache,
        )
        if past_key_values is not None:
            past_key_values.crop(prefix_len)
        assert outputs[1] is not None
        return self._velocity(outputs[1])
