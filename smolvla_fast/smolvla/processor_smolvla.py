"""SmolVLA's pre- and postprocessor: from what a robot measures to what the model reads, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .configuration_smolvla import SmolVLAConfig
from .normalization import NormalizerProcessorStep, UnnormalizerProcessorStep
from .pipeline import PolicyProcessorPipeline
from .processor_steps import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NewLineTaskProcessorStep,
    RenameObservationsProcessorStep,
    TokenizerProcessorStep,
)
from .transition import policy_action_to_transition, transition_to_policy_action

PREPROCESSOR_NAME = "policy_preprocessor"
POSTPROCESSOR_NAME = "policy_postprocessor"

Stats = dict[str, dict[str, Any]]


def make_smolvla_pre_post_processors(
    config: SmolVLAConfig, dataset_stats: Stats | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Fresh processors of a configuration. Corresponds to LeRobot's function of the same name.

    The preprocessor renames observations, adds the batch dimension, ends the task with a newline, tokenizes it, moves
    everything to ``config.device`` and normalises states and actions. The postprocessor takes the model's action back
    to the data's units and to the CPU.

    dataset_stats  feature -> {"mean": ..., "std": ...}; without statistics nothing is scaled
    """
    device = config.device or "cpu"
    inputs, outputs = config.input_features or {}, config.output_features or {}
    norm_map: Any = config.normalization_mapping
    before = [
        RenameObservationsProcessorStep(),
        AddBatchDimensionProcessorStep(),
        NewLineTaskProcessorStep(),
        TokenizerProcessorStep(
            tokenizer_name=config.vlm_model_name,
            padding=config.pad_language_to,
            padding_side="right",
            max_length=config.tokenizer_max_length,
        ),
        DeviceProcessorStep(device=device),
        NormalizerProcessorStep({**inputs, **outputs}, norm_map, dataset_stats),
    ]
    after = [UnnormalizerProcessorStep(outputs, norm_map, dataset_stats), DeviceProcessorStep(device="cpu")]
    return (
        PolicyProcessorPipeline(before, PREPROCESSOR_NAME),
        PolicyProcessorPipeline(
            after, POSTPROCESSOR_NAME, policy_action_to_transition, transition_to_policy_action
        ),
    )


def make_pre_post_processors(
    policy_cfg: SmolVLAConfig,
    pretrained_path: str | Path | None = None,
    *,
    dataset_stats: Stats | None = None,
    preprocessor_overrides: dict[str, dict[str, Any]] | None = None,
    postprocessor_overrides: dict[str, dict[str, Any]] | None = None,
    **hub_options: Any,
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """The processors saved in a checkpoint, or fresh ones without ``pretrained_path``; LeRobot's factory, for
    SmolVLA.

    The preprocessor moves data to ``policy_cfg.device``, whatever device the file names: a checkpoint trained on a
    GPU runs on a CPU. Overrides are those of ``PolicyProcessorPipeline.from_pretrained``. ``dataset_stats`` replace
    the statistics of the files.
    """
    if pretrained_path is None:
        return make_smolvla_pre_post_processors(policy_cfg, dataset_stats)
    before = {"device_processor": {"device": policy_cfg.device}, **(preprocessor_overrides or {})}
    after = dict(postprocessor_overrides or {})
    if dataset_stats is not None:
        before["normalizer_processor"] = {"stats": dataset_stats, **before.get("normalizer_processor", {})}
        after["unnormalizer_processor"] = {"stats": dataset_stats, **after.get("unnormalizer_processor", {})}
    return (
        PolicyProcessorPipeline.from_pretrained(
            pretrained_path, f"{PREPROCESSOR_NAME}.json", overrides=before, **hub_options
        ),
        PolicyProcessorPipeline.from_pretrained(
            pretrained_path,
            f"{POSTPROCESSOR_NAME}.json",
            overrides=after,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
            **hub_options,
        ),
    )


def prepare_observation_for_inference(
    observation: dict[str, np.ndarray],
    device: torch.device | str = "cpu",
    task: str | None = None,
    robot_type: str | None = None,
    *,
    keep_bytes: bool = False,
) -> dict[str, Any]:
    """What cameras and encoders deliver, as a batch of one for the preprocessor. LeRobot's function, copying its
    input.

    observation  name -> array; names with "image" in them are frames [h, w, 3], uint8 in [0, 255] or float in [0, 1]
    task         the instruction in words
    keep_bytes   uint8 frames stay bytes, [1, h, w, 3], a quarter of what goes to a GPU; LeRobot's policy cannot read them,
                 ours can, and a patched one fits and scales them on its device
    """
    batch: dict[str, Any] = {}
    for name, array in observation.items():
        value = torch.from_numpy(np.ascontiguousarray(array))
        if "image" in name:
            if value.ndim != 3 or value.shape[-1] not in (1, 3, 4):
                raise ValueError(
                    f"{name} must be a frame [height, width, channels], got shape {tuple(value.shape)}"
                )
            if not keep_bytes or value.dtype is not torch.uint8:
                value = value.to(torch.float32) / 255 if value.dtype is torch.uint8 else value
                value = value.permute(2, 0, 1).contiguous()
        if torch.device(device).type == "cuda":
            value = value.pin_memory()  # so that the copy does not hold up this thread
        batch[name] = value.unsqueeze(0).to(device, non_blocking=True)
    return {**batch, "task": task or "", "robot_type": robot_type or ""}
