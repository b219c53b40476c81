"""Computes the loss of two samples before a run begins, so that errors of a step show before anything is written.

The computation decides what is accepted: all that LeRobot's policy can compute is trained. ``_features`` and ``_frames``
only explain an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..ops.memory import is_out_of_memory
from ..patch import find_policy
from ..smolvla import FeatureType, NormalizationMode, PolicyFeature, SmolVLAConfig
from ..smolvla.features import ACTION, OBS_STATE
from .data import Data, few_samples, to_floats
from .errors import TrainingError
from .features import as_flag, how_to_remove
from .random_state import seeded
from .settings import TrainSettings


@torch.no_grad()
def try_step(
    settings: TrainSettings, data: Data, policy: Any, preprocess: Any, autocast: AbstractContextManager
) -> None:
    """Computes the loss of the first and the last sample, in noise of its own, and drops it.

    raises  TrainingError with the features at fault, where they are known, and what to do about them; an error of memory
            as it is
    """
    with seeded(0), autocast, torch.compiler.set_stance("force_eager"):
        raw: dict[str, Any] = {}
        try:
            raw = few_samples(settings, data.train)
            policy.forward(preprocess(to_floats(raw, settings.policy.device or "cpu")))
        except Exception as error:
            if isinstance(error, TrainingError) or is_out_of_memory(error):  # no fault of the dataset's
                raise
            # Reader, processors and both implementations of the policy each raise their own.
            raise TrainingError(_message(settings, data.names, policy, raw, error)) from error


def _message(settings: TrainSettings, names: dict[str, str], policy: Any, raw: dict, error: Exception) -> str:
    given = {names.get(key, key): value for key, value in raw.items() if isinstance(value, Tensor)}
    causes = [*_features(settings, names, given), *_frames(settings.policy, policy, given)]
    if not causes:
        wanted = [*(settings.policy.input_features or {}), ACTION]
        shapes = [f"{k!r} {list(v.shape)} {str(v.dtype)[6:]}" for k, v in given.items() if k in wanted]
        accepted = (
            "cameras [batch, 1, 3, height, width], 'observation.state' [batch, 1, n] with n <= policy.max_state_dim and "
            "'action' [batch, policy.chunk_size, n] with n <= policy.max_action_dim, all of numbers"
        )
        read = f"Read were {', '.join(shapes)}; accepted are {accepted}" if raw else "No sample could be read"
        causes = [f"{read}. Mend the dataset, or set --policy.* to fit it"]
    said = (str(error).splitlines() or [""])[0].rstrip(".")
    return f"a step on this dataset fails with {type(error).__name__}: {said}. {'; '.join(causes)}. Nothing was written"


def _features(settings: TrainSettings, names: dict[str, str], given: dict[str, Tensor]) -> Iterator[str]:
    """Faults of the features that the policy declares, and how to train without them."""
    config, inputs = settings.policy, settings.policy.input_features or {}
    declared = {**inputs, **(config.output_features or {})}
    faults = {key: _fault(config, key, declared[key], given[key]) for key in declared if key in given}
    bad = {key: fault for key, fault in faults.items() if fault}
    yield from bad.values()
    left = {key: feature for key, feature in inputs.items() if key not in bad}
    cameras = [key for key in left if left[key].type is FeatureType.VISUAL and key in given]
    if not bad or OBS_STATE in bad or ACTION in bad or not cameras:
        return
    if settings.policy_path:  # a flag would add to the checkpoint's features, not replace them
        yield f"to train without it, {how_to_remove([old for old, new in names.items() if new in bad])}"
    else:
        features = {k: {"type": f.type.value, "shape": list(f.shape)} for k, f in left.items()}
        yield f"give --policy.input_features={as_flag(features)} to train without {', '.join(map(repr, bad))}"


def _fault(config: SmolVLAConfig, key: str, feature: PolicyFeature, value: Tensor) -> str | None:
    mode = config.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
    as_it_is = mode is NormalizationMode.IDENTITY
    if feature.type is FeatureType.VISUAL and value.shape[-3] != 3:
        return f"{key!r} is a camera of {value.shape[-3]} channel(s), SmolVLA reads 3 (RGB)"
    if value.dtype is torch.bool and not as_it_is:
        return f"{key!r} is of truth values, normalisation {mode.value} is for numbers: record it as float32"
    if key in (OBS_STATE, ACTION) and as_it_is and not value.is_floating_point():
        return f"{key!r} is {str(value.dtype)[6:]}, and without normalisation the policy needs float32"
    if key == OBS_STATE and value.ndim > 4:
        return f"{key!r} has the shape {list(feature.shape)}, the policy reads vectors [n] or matrices [m, n]"
    return None


def _frames(config: SmolVLAConfig, policy: Any, given: dict[str, Tensor]) -> Iterator[str]:
    """Faults of the size in which frames reach the vision tower."""
    vlm = find_policy(policy).model.vlm_with_expert.get_vlm_model()
    step = vlm.vision_model.embeddings.patch_size * vlm.connector.scale_factor
    side = vlm.vision_model.embeddings.image_size
    size = config.resize_imgs_with_padding
    sizes = {key: size or given[key].shape[:-3:-1] for key in config.image_features if key in given}
    bad = {key: (w, h) for key, (w, h) in sizes.items() if w != h or w % step}
    if bad:
        frames = ", ".join(f"{key!r} {width} x {height}" for key, (width, height) in bad.items())
        yield (
            f"resize_imgs_with_padding={size} makes frames of width x height: {frames}; the vision tower takes squares "
            f"whose side is a multiple of {step}, such as --policy.resize_imgs_with_padding=[{side},{side}]"
        )
