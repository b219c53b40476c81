"""SmolVLA's pre- and postprocessor: from a robot's observation to the model's input, and from its output to an action."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .configuration_smolvla import SmolVLAConfig
from .features import FeatureType, NormalizationMode, parse_enum, parse_features
from .hub import is_absent
from .normalization import WAY_OUT, NormalizerProcessorStep, UnnormalizerProcessorStep
from .pipeline import PolicyProcessorPipeline, read_normalizers
from .processor_steps import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NewLineTaskProcessorStep,
    RenameObservationsProcessorStep,
    TokenizerProcessorStep,
)
from .statistics_names import buffers_to_stats
from .transition import policy_action_to_transition, transition_to_policy_action
from .weights_io import read_buffers

logger = logging.getLogger(__name__)

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

    dataset_stats  feature -> {"mean": ..., "std": ...}; a feature without is not scaled, with a warning
    """
    processors = _fresh(config, dataset_stats)
    _warn(config, *processors)
    return processors


def _fresh(
    config: SmolVLAConfig, dataset_stats: Stats | None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
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
    """The processors saved in a checkpoint, or fresh ones without ``pretrained_path``. Replaces LeRobot's factory.

    The preprocessor moves data to ``policy_cfg.device``, whatever device the file names: a checkpoint trained on a GPU runs
    on a CPU. A checkpoint from before LeRobot 0.4 has no processors: they are made from the statistics among its weights.
    Features that are not scaled although ``policy_cfg`` has a mode for them get a warning.

    dataset_stats  replace the statistics of the files
    *_overrides    as in ``PolicyProcessorPipeline.from_pretrained``
    raises         ValueError where the statistics among the weights are ambiguous or lack a feature
    """
    if pretrained_path is None:
        return make_smolvla_pre_post_processors(policy_cfg, dataset_stats)
    if _has_no_processors(pretrained_path, hub_options) and (
        buffers := read_buffers(pretrained_path, **hub_options)
    ):
        stats = dataset_stats or _stats_of_buffers(policy_cfg, buffers, pretrained_path)
        with tempfile.TemporaryDirectory() as folder:
            for pipeline in _fresh(policy_cfg, stats):
                pipeline.save_pretrained(folder)
            return make_pre_post_processors(
                policy_cfg, folder, dataset_stats=stats, preprocessor_overrides=preprocessor_overrides,
                postprocessor_overrides=postprocessor_overrides,
            )  # fmt: skip
    before = {"device_processor": {"device": policy_cfg.device}, **(preprocessor_overrides or {})}
    after = dict(postprocessor_overrides or {})
    if dataset_stats is not None:
        before["normalizer_processor"] = {"stats": dataset_stats, **before.get("normalizer_processor", {})}
        after["unnormalizer_processor"] = {"stats": dataset_stats, **after.get("unnormalizer_processor", {})}
    processors = (
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
    _warn(policy_cfg, *processors)
    return processors


def unnormalized(config: Any, before: Iterable[Any], after: Iterable[Any]) -> dict[str, str]:
    """Feature -> why it is not normalised, for features that ``config.normalization_mapping`` has a mode for.

    config         ours or LeRobot's
    before, after  steps of the two pipelines, at least those that normalise
    """
    inputs = parse_features(config.input_features, "input_features") or {}
    outputs = parse_features(config.output_features, "output_features") or {}
    modes = {FeatureType(kind): mode for kind, mode in (config.normalization_mapping or {}).items()}
    faults: dict[str, str] = {}
    for steps, features, kind in (
        (before, {**inputs, **outputs}, NormalizerProcessorStep),
        (after, outputs, UnnormalizerProcessorStep),
    ):
        found = [step for step in steps if type(step) is kind]
        for key, feature in features.items():
            mode = parse_enum(NormalizationMode, modes.get(feature.type, "IDENTITY"), "normalization_mapping")
            if mode is NormalizationMode.IDENTITY or "empty_camera" in key:
                continue
            reasons = [step.fault(key, feature) for step in found] or [
                f"there is no {kind.registry_name} in its pipeline"
            ]
            if all(reasons):
                faults.setdefault(key, str(reasons[0]))
    return faults


def unnormalized_in(config: Any, source: str | Path, **hub_options: Any) -> dict[str, str]:
    """``unnormalized`` of a checkpoint's processors, read without their tokenizer; where it has none, of those that its
    weights' statistics make.

    raises  FileNotFoundError, ValueError for files that are missing or cannot be read
    """
    if not _has_no_processors(source, hub_options):
        names = (f"{PREPROCESSOR_NAME}.json", f"{POSTPROCESSOR_NAME}.json")
        return unnormalized(config, *(read_normalizers(source, name, **hub_options) for name in names))
    if buffers := read_buffers(source, **hub_options):
        return _read_stats(config, buffers)[1]
    reason = "there are neither processors nor, as before LeRobot 0.4, whole statistics among the weights"
    return dict.fromkeys(unnormalized(config, (), ()), reason)


def not_normalised(faults: dict[str, str]) -> str:
    """A clause for a message."""
    return f"not normalised: {'; '.join(f'{key} ({reason})' for key, reason in faults.items())}"


def _warn(config: SmolVLAConfig, before: PolicyProcessorPipeline, after: PolicyProcessorPipeline) -> None:
    faults = unnormalized(config, before.steps, after.steps)
    if faults:
        logger.warning("%s. %s", not_normalised(faults), WAY_OUT)
    for step in (*before.steps, *after.steps):
        if isinstance(step, NormalizerProcessorStep):
            for key in faults:
                step.skip_check(key)


def _has_no_processors(source: str | Path, hub_options: dict[str, Any]) -> bool:
    return all(
        is_absent(source, f"{name}.json", **hub_options) for name in (PREPROCESSOR_NAME, POSTPROCESSOR_NAME)
    )


def _read_stats(config: Any, buffers: dict[str, Any]) -> tuple[Stats, dict[str, str]]:
    """Statistics by feature, and the reason for each feature without usable ones."""
    features = {**(config.input_features or {}), **(config.output_features or {})}
    stats, unclear = buffers_to_stats(buffers, features)
    step = NormalizerProcessorStep(features, config.normalization_mapping, stats)
    faults = unnormalized(config, [step], [UnnormalizerProcessorStep(features, step.norm_map, stats)])
    for key in set(faults) & set(unclear):
        faults[key] = f"there are several: {unclear[key]}"
    return stats, faults


def _stats_of_buffers(config: SmolVLAConfig, buffers: dict[str, Any], source: str | Path) -> Stats:
    stats, faults = _read_stats(config, buffers)
    if faults:
        raise ValueError(
            f"{source} has no processors, and of the statistics among its weights, {sorted(buffers)}, none can be made: "
            f"{not_normalised(faults)}. Pass those of the training data as dataset_stats={{feature: {{'mean': ..., "
            "'std': ...}}}}"
        )
    logger.warning(
        "%s has no processors, as before LeRobot 0.4: they are made of its configuration and of the statistics among its "
        "weights, %s", source, sorted(buffers),
    )  # fmt: skip
    return stats


def prepare_observation_for_inference(
    observation: dict[str, np.ndarray],
    device: torch.device | str = "cpu",
    task: str | None = None,
    robot_type: str | None = None,
    *,
    keep_bytes: bool = False,
) -> dict[str, Any]:
    """A robot's observation as a batch of one for the preprocessor. Replaces LeRobot's function; copies its input.

    observation  name -> array; names with "image" in them are frames [h, w, 3], uint8 in [0, 255] or float in [0, 1]
    task         the instruction in words
    keep_bytes   leave uint8 frames as bytes, [1, h, w, 3], a quarter of fp32's traffic to a GPU; our policy reads them,
                 LeRobot's does not, and a patched one resizes and scales them on its device
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
            value = value.pin_memory()  # an asynchronous copy needs pinned memory
        batch[name] = value.unsqueeze(0).to(device, non_blocking=True)
    return {**batch, "task": task or "", "robot_type": robot_type or ""}
