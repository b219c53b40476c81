"""Makes the policy to train, and its processors."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..ops.processor import why_bf16_is_slow
from ..smolvla import SmolVLAPolicy, make_pre_post_processors
from ..smolvla.hub import is_absent
from ..smolvla.processor_smolvla import PREPROCESSOR_NAME, not_normalised, unnormalized
from ..smolvla.processor_steps import RenameObservationsProcessorStep
from ..smolvla.weights_io import WeightsError, check_names
from .checkpoint import ANOTHER
from .errors import TrainingError
from .settings import TrainSettings

logger = logging.getLogger(__name__)


def make_policy(settings: TrainSettings, source: str | Path | None) -> Any:
    """Ours or LeRobot's ``SmolVLAPolicy`` in train mode on ``settings.policy.device``.

    source  checkpoint to load weights or adapters from; None: fresh weights
    raises  TrainingError for weights that are missing or of another configuration, and for an impossible policy
    """
    config: Any = settings.policy
    try:
        adapted = config.use_peft
        if adapted and settings.peft and source == settings.policy_path:  # a resumed run goes on with its own
            raise ValueError(
                "it holds adapters already, which --peft.* would not change; leave those out, or start from their base"
            )
        config.use_peft = adapted or settings.peft is not None
        policy_class: Any = SmolVLAPolicy
        if settings.implementation == "lerobot" or config.use_peft:
            import draccus
            from lerobot.configs import PreTrainedConfig
            from lerobot.policies.smolvla import modeling_smolvla

            policy_class = modeling_smolvla.SmolVLAPolicy
            config = draccus.decode(PreTrainedConfig, config.to_dict())
        base = source
        if adapted:
            from peft import PeftConfig, PeftModel

            adapters = PeftConfig.from_pretrained(str(source))
            base = adapters.base_model_name_or_path
        policy = policy_class(config) if base is None else policy_class.from_pretrained(base, config=config)
        if base is not None:
            check_names(policy, base)
        if adapted:
            policy = PeftModel.from_pretrained(policy, str(source), config=adapters, is_trainable=True)
        elif settings.peft:
            policy = policy.wrap_with_peft(peft_cli_overrides=asdict(settings.peft))
        return policy.to(config.device).train()
    except Exception as error:
        # Files, the Hub, safetensors, the configuration and the device each raise their own.
        what = "a fresh policy" if source is None else f"the policy of {source}"
        said = error.what if isinstance(error, WeightsError) else error
        raise TrainingError(f"cannot make {what}: {said or type(error).__name__}") from error


def check_policy(settings: TrainSettings) -> None:
    """Makes the policy on the meta device, in no time and no memory, before the dataset is opened.

    raises  TrainingError for a missing backbone, and for sizes that are impossible or beyond this machine's memory
    """
    plain: dict[str, Any] = {"load_vlm_weights": False, "compile_model": False, "device": "cpu"}
    config = replace(settings.policy, input_features={}, output_features={}, **plain)
    try:
        with torch.device("meta"):
            sizes = [parameter.numel() for parameter in SmolVLAPolicy(config).parameters()]
        if not all(sizes):
            raise ValueError("some of its layers would have no weights")
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        if (needed := 4 * sum(sizes) / 2**30) > there:
            raise ValueError(f"its weights need {needed:,.0f} GiB, this machine has {there:,.0f}")
    except Exception as error:  # torch, transformers and the Hub each raise their own
        names = ["vlm_model_name", "num_vlm_layers", "num_expert_layers", "expert_width_multiplier"]
        names += ["max_state_dim", "max_action_dim"]
        given = ", ".join(f"--policy.{name}={getattr(config, name)}" for name in names)
        raise TrainingError(f"no policy can be made of {given}: {error}") from error


def speed_up(policy: Any, settings: TrainSettings) -> tuple[bool, str]:
    """Patches the policy for training where possible. Returns whether to fuse the optimizer, and the outcome in words.

    raises  TrainingError for ``fast="on"`` where it is not possible
    """
    from ..patch import patch, status, unpatch
    from ..patching.settings import DISABLE, disabled

    if settings.fast == "off":
        return False, "plain, as asked for"
    patch(policy, training=True)
    now = status(policy)
    if reason := f"{DISABLE} is set" if disabled() else now.training_fallback:
        unpatch(policy)
        if settings.fast == "on":
            raise TrainingError(f"--fast=on: {reason}; use --fast=auto, which then trains the plain policy")
        return False, f"plain: {reason}"
    device = torch.device(policy.config.device).type
    parts = ["patched for training"]
    if modules := now.training_fallback_reasons.get("frozen prefix"):
        parts.append(f"but for the frozen prefix ({modules})")
    if fused := device in ("cpu", "cuda"):
        parts.append("AdamW fused")
    if settings.bf16 and device == "cpu" and (slow := why_bf16_is_slow()):
        parts.append(f"products in fp32 ({slow})")
    return fused, ", ".join(parts)


def make_processors(
    settings: TrainSettings, stats: dict[str, Any], source: str | Path | None, resume: bool
) -> tuple[Any, Any]:
    """Pre- and postprocessor: fresh; a checkpoint's with this dataset's statistics; or, on resume, exactly its own.

    A checkpoint without processors, as LeRobot wrote them before version 0.4, gets fresh ones.

    stats   of the dataset, under the policy's names
    raises  TrainingError for unreadable files, on resume for missing ones, and for processors that do not normalise a
            feature although the configuration says so
    """
    if source is not None and not resume and is_absent(source, f"{PREPROCESSOR_NAME}.json"):
        logger.warning("%s has no %s.json: processors are made from the dataset", source, PREPROCESSOR_NAME)
        source = None
    config, outputs = settings.policy, settings.policy.output_features or {}
    scaled = {"features": outputs, "norm_map": config.normalization_mapping}
    before = {
        "rename_observations_processor": {"rename_map": settings.rename_map},
        "normalizer_processor": {**scaled, "features": {**(config.input_features or {}), **outputs}},
    }
    after = {"unnormalizer_processor": scaled}
    given = dict(dataset_stats=stats, preprocessor_overrides=before, postprocessor_overrides=after)
    try:
        preprocess, postprocess = make_pre_post_processors(config, source, **({} if resume else given))
    except (OSError, ValueError, KeyError) as error:
        if source is None:
            raise
        again = f"copy or download them again, or remove {PREPROCESSOR_NAME}.json to have them made from the dataset"
        said = f"cannot read the processors of {source}: {error}; {ANOTHER if resume else again}"
        raise TrainingError(said) from error
    if source is None:
        rename = next(step for step in preprocess.steps if isinstance(step, RenameObservationsProcessorStep))
        rename.rename_map = settings.rename_map
    if faults := unnormalized(settings.policy, preprocess.steps, postprocess.steps):
        raise TrainingError(
            f"the processors of {source} leave values as they are, {not_normalised(faults)}; take another checkpoint, "
            f"remove {PREPROCESSOR_NAME}.json of this one to have them made from the dataset in a new run, or switch it "
            "off with --policy.normalization_mapping"
        )
    return preprocess, postprocess
