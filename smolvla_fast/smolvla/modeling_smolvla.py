"""SmolVLA (arXiv 2506.01844): the policy, for robots and training loops.

``SmolVLAPolicy`` turns batches into tensors and chunks into actions; the model between the two is
``VLAFlowMatching``. Names, signatures and state_dict keys are those of LeRobot 0.6.1, and so are results, bit by bit.
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.reference.image_prep import as_floats, resize_with_pad
from . import aloha
from .configuration_smolvla import SmolVLAConfig
from .features import ACTION, OBS_IMAGES, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from .flow_model import VLAFlowMatching
from .hub import WEIGHTS_NAME, find_file, split_hub_options
from .rtc import RTCProcessor
from .statistics_names import split_buffers
from .weights_io import load_weights, read_safetensors, write_weights

logger = logging.getLogger(__name__)

__all__ = ["SmolVLAPolicy", "VLAFlowMatching", "pad_vector"]


def pad_vector(vector: Tensor, new_dim: int) -> Tensor:
    """Pads the last dimension with zeros up to ``new_dim``; returns a vector of that width or more as it is."""
    missing = new_dim - vector.shape[-1]
    return F.pad(vector, (0, missing)) if missing > 0 else vector


class SmolVLAPolicy(nn.Module):
    """SmolVLA as a LeRobot-style policy, without LeRobot.

    A batch maps names to tensors, as ``make_smolvla_pre_post_processors`` prepares it:

    observation.images.*                  [B, 3, h, w] or [B, time, 3, h, w]  float in [0, 1]; the last time
                                          is used
    observation.state                     [B, n] or [B, time, n]  normalised, n <= max_state_dim
    observation.language.tokens           [B, T]  int64     observation.language.attention_mask  [B, T]  bool
    action  (training)                    [B, chunk_size, n]  normalised
    action_is_pad  (training, optional)   [B, chunk_size]  bool, True beyond the end of the episode
    """

    config_class = SmolVLAConfig
    name = "smolvla"

    def __init__(self, config: SmolVLAConfig, **kwargs: Any):
        super().__init__()
        if not isinstance(config, SmolVLAConfig):
            raise ValueError(
                "config must be a smolvla_fast SmolVLAConfig, got "
                f"{type(config).__module__}.{type(config).__name__}; "
                "use SmolVLAConfig.from_pretrained(folder) or SmolVLAPolicy.from_pretrained(folder)"
            )
        config.validate_features()
        self.config = config
        self.rtc_processor: RTCProcessor | None = None
        self.init_rtc_processor()
        self.model = VLAFlowMatching(config, rtc_processor=self.rtc_processor)
        self._warned_cameras = False
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: SmolVLAConfig | None = None,
        strict: bool = True,
        **hub_options: Any,
    ) -> SmolVLAPolicy:
        """A policy in evaluation mode on ``config.device``, from a folder or a Hub repository of LeRobot or of ours.

        Statistics among the weights, from before LeRobot 0.4, are left to ``make_pre_post_processors``.

        config  used instead of the checkpoint's ``config.json``
        strict  True: RuntimeError for a weight that is missing, unexpected or misshapen (LeRobot only logs the first two)
        raises  FileNotFoundError for missing files, ValueError for an unreadable configuration or weights file
        """
        options = split_hub_options(hub_options, "SmolVLAPolicy.from_pretrained")
        if config is None:
            config = SmolVLAConfig.from_pretrained(pretrained_name_or_path, **options)
        path = find_file(pretrained_name_or_path, WEIGHTS_NAME, **options)
        policy = cls(config)
        weights, buffers = split_buffers(read_safetensors(path))
        load_weights(policy, weights, strict=strict, source=str(path))
        if buffers:
            logger.warning(
                "%s dates from before LeRobot 0.4: the statistics among its weights, %s, are not the policy's but of its "
                "processors, which make_pre_post_processors(policy.config, %r) makes of them",
                path, sorted(buffers), str(pretrained_name_or_path),
            )  # fmt: skip
        policy.to(config.device)
        policy.eval()
        return policy

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, which LeRobot loads; ``state_dict`` replaces our own."""
        folder = Path(save_directory)
        self.config.save_pretrained(folder)
        write_weights(self, folder / WEIGHTS_NAME, state_dict)

    def supports_rtc(self) -> bool:
        return True

    def reset(self) -> None:
        """Empties the queue of actions. Call it at the start of every episode."""
        self._queues: dict[str, deque[Tensor]] = {ACTION: deque(maxlen=self.config.n_action_steps)}

    def init_rtc_processor(self) -> None:
        """Makes the RTC processor from ``config.rtc_config``. Call it after replacing that setting."""
        self.rtc_processor = None
        if self.config.rtc_config is not None:
            self.rtc_processor = RTCProcessor(self.config.rtc_config)
            model = getattr(self, "model", None)
            if model is not None:
                model.rtc_processor = self.rtc_processor

    def _rtc_enabled(self) -> bool:
        return self.config.rtc_config is not None and self.config.rtc_config.enabled

    def get_optim_params(self) -> Any:
        return self.parameters()

    def _action_dim(self) -> int:
        feature = self.config.action_feature
        if feature is None:
            declared = sorted(self.config.output_features or {})
            raise ValueError(
                f"config.output_features must declare 'action' with type ACTION, it declares {declared}"
            )
        return feature.shape[0]

    def _get_action_chunk(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        action_dim = self._action_dim()
        images, img_masks = self.prepare_images(batch)
        state = self.prepare_state(batch)
        tokens, masks = _language(batch)
        actions = self.model.sample_actions(images, img_masks, tokens, masks, state, noise=noise, **kwargs)
        actions = actions[:, :, :action_dim]
        return aloha.encode_actions(actions) if self.config.adapt_to_pi_aloha else actions

    def _evaluate(self) -> None:
        """As ``eval()``, which takes longer than to ask all modules whether one still trains: it writes to each."""
        if any(module.training for module in self.modules()):
            self.eval()

    def _prepare_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Converts Aloha's state and actions in a copy. LeRobot does so in place, so a batch used twice goes wrong."""
        if not self.config.adapt_to_pi_aloha:
            return batch
        batch = {**batch, OBS_STATE: aloha.decode_state(_required(batch, OBS_STATE))}
        if ACTION in batch and batch[ACTION] is not None:
            batch[ACTION] = aloha.encode_actions_inv(batch[ACTION])
        return batch

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """A chunk of actions for the observation; sets evaluation mode.

        noise    [B, chunk_size, max_action_dim] fp32; drawn if None
        kwargs   inference_delay, prev_chunk_left_over, execution_horizon, see ``RTCProcessor.denoise_step``
        returns  [B, chunk_size, action dim] fp32, normalised
        """
        self._evaluate()
        return self._get_action_chunk(self._prepare_batch(batch), noise, **kwargs)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The next action [B, action dim] of the queue, which is refilled by a new chunk when empty.

        Raises AssertionError under RTC, which needs whole chunks (``predict_action_chunk``).
        """
        if self._rtc_enabled():
            raise AssertionError(
                "select_action does not work with rtc_config.enabled; use predict_action_chunk"
            )
        self._evaluate()
        queue = self._queues[ACTION]
        if not queue:
            actions = self._get_action_chunk(self._prepare_batch(batch), noise)
            queue.extend(actions.transpose(0, 1)[: self.config.n_action_steps])
        return queue.popleft()

    def forward(
        self,
        batch: dict[str, Tensor],
        noise: Tensor | None = None,
        time: Tensor | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor, dict[str, float]]:
        """The flow-matching loss of a training batch.

        noise      [B, chunk_size, max_action_dim] fp32 and time [B] fp32; drawn if None
        reduction  "mean": a scalar over all valid (time, action) entries; "none": [B], a mean per sample
        returns    loss and its stages for logging
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        action_dim = self._action_dim()
        _required(batch, ACTION)
        batch = self._prepare_batch(batch)
        images, img_masks = self.prepare_images(batch)
        state = self.prepare_state(batch)
        actions = self.prepare_action(batch)
        tokens, masks = _language(batch)
        losses = self.model.forward(images, img_masks, tokens, masks, state, actions, noise, time)
        losses = losses[:, :, :action_dim]
        record = {"losses_after_forward": _logged(losses)}

        is_pad = batch.get("action_is_pad")
        if is_pad is not None:
            losses = losses * (~is_pad).unsqueeze(-1)
            record["losses_after_in_ep_bound"] = _logged(losses)
        losses = losses[:, :, : self.config.max_action_dim]
        record["losses_after_rm_padding"] = _logged(losses)

        dims: tuple[int, ...] = (1, 2) if reduction == "none" else (0, 1, 2)
        if is_pad is None:
            loss = losses.mean(dim=dims) if reduction == "none" else losses.mean()
        else:
            valid = (~is_pad).sum(dim=1) if reduction == "none" else (~is_pad).sum()
            total = losses.sum(dim=dims) if reduction == "none" else losses.sum()
            loss = total / (valid * losses.shape[-1]).clamp_min(1)
        record["loss"] = loss.mean().item()
        return loss, record

    def prepare_images(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Frames resized with padding and scaled to [-1, 1], and per camera whether it is present, [B] bool.

        Bytes, [B, 3, h, w] or [B, h, w, 3] uint8, are accepted beside floats in [0, 1]; LeRobot takes floats alone.
        The model is given them as they are where it resizes alike, and fits and scales them on its device.
        Cameras come in the order of ``config.input_features``. ``<camera>_padding_mask`` in the batch marks missing
        frames. Up to ``empty_cameras`` absent cameras are replaced by masked blank frames; further absent ones are
        left out, which shortens the prefix. ValueError when every camera is absent.
        """
        declared = list(self.config.image_features)
        present = [key for key in declared if key in batch]
        missing = [key for key in declared if key not in batch]
        if not present:
            found = sorted(key for key in batch if key.startswith(f"{OBS_IMAGES}.")) or "none"
            raise ValueError(
                f"no camera of config.input_features is in the batch: accepted are {declared}, got {found}"
            )
        self._warn_about_cameras(batch, missing)
        images, masks = [], []
        for key in present:
            image = batch[key][:, -1] if batch[key].ndim == 5 else batch[key]
            if image.ndim != 4:
                raise ValueError(
                    f"{key} must be [batch, channels, height, width] or have a time dimension after batch, "
                    "got shape "
                    f"{tuple(batch[key].shape)}; the preprocessor adds the batch dimension"
                )
            images.append(self._prepare_frames(image))
            mask = batch.get(f"{key}_padding_mask")
            there = torch.ones(image.shape[0], dtype=torch.bool, device=image.device)
            masks.append(there if mask is None else mask.bool())
        for _ in missing[: self.config.empty_cameras]:
            blank = torch.full_like(images[-1], 0.0 if images[-1].dtype is torch.uint8 else -1.0)
            images.append(blank)
            masks.append(torch.zeros_like(masks[-1]))
        return images, masks

    def _prepare_frames(self, frames: Tensor) -> Tensor:
        size = self.config.resize_imgs_with_padding
        if frames.dtype is torch.uint8:
            side = self.model.vlm_with_expert.get_vlm_model().vision_model.embeddings.image_size
            if size == (side, side):
                return frames
            frames = as_floats(frames, torch.float32)
        if size is not None:
            width, height = size
            frames = resize_with_pad(frames, height, width, pad_value=0)
        return frames * 2.0 - 1.0

    def _warn_about_cameras(self, batch: dict[str, Tensor], missing: list[str]) -> None:
        left_out = missing[self.config.empty_cameras :]
        if not left_out or self._warned_cameras:
            return
        self._warned_cameras = True
        extra = [k for k in batch if k.startswith(f"{OBS_IMAGES}.") and k not in self.config.image_features]
        unused = [key for key in extra if not key.endswith(("_padding_mask", "_is_pad"))]
        logger.warning(
            "cameras %s of config.input_features are not in the batch and are left out%s",
            left_out,
            f"; cameras {unused} of the batch are not declared and ignored" if unused else "",
        )

    def prepare_state(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, max_state_dim]; ValueError for a state that is wider."""
        state = _required(batch, OBS_STATE)
        state = state[:, -1, :] if state.ndim > 2 else state
        self._check_width(state, "max_state_dim", OBS_STATE)
        return pad_vector(state, self.config.max_state_dim)

    def prepare_action(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, chunk_size, max_action_dim]; ValueError for an action that is wider."""
        actions = _required(batch, ACTION)
        self._check_width(actions, "max_action_dim", ACTION)
        return pad_vector(actions, self.config.max_action_dim)

    def _check_width(self, x: Tensor, field: str, key: str) -> None:
        accepted = getattr(self.config, field)
        if x.shape[-1] > accepted:
            raise ValueError(f"{key} has {x.shape[-1]} values, config.{field} accepts at most {accepted}")


def _logged(losses: Tensor) -> float:
    """Mean of a dense copy: torch sums a slice of a wider tensor in another order, to other bits."""
    return losses.clone().mean().item()


def _required(batch: dict[str, Tensor], key: str) -> Tensor:
    value = batch.get(key)
    if value is None:
        raise KeyError(
            f"{key!r} is missing from the batch, which has "
            f"{sorted(k for k, v in batch.items() if v is not None)}"
        )
    return value


def _language(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if batch.get(OBS_LANGUAGE_TOKENS) is None or batch.get(OBS_LANGUAGE_ATTENTION_MASK) is None:
        raise KeyError(
            f"{OBS_LANGUAGE_TOKENS!r} and {OBS_LANGUAGE_ATTENTION_MASK!r} are missing from the batch: pass "
            "it through the "
            "preprocessor of make_smolvla_pre_post_processors, which makes them from 'task'"
        )
    return batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
