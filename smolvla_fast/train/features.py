"""Matches a dataset's features with a policy's: by name, kind and size."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from ..smolvla import FeatureType, PolicyFeature
from ..smolvla.features import ACTION, OBS_PREFIX, OBS_STATE
from .errors import TrainingError
from .settings import TrainSettings

logger = logging.getLogger(__name__)


def policy_names(features: Mapping[str, Any], rename_map: dict[str, str]) -> dict[str, str]:
    """{name in the dataset: name in the policy}. Only observations are renamed, as by the preprocessor.

    features  of the dataset, as in its info.json
    raises    TrainingError for two features under one name
    """
    renamed = {name: rename_map.get(name, name) if name.startswith(OBS_PREFIX) else name for name in features}
    sources: dict[str, str] = {}
    for old, new in renamed.items():
        both = sources.setdefault(new, old), old
        if both[0] == old:
            continue
        cameras = [name for name in both if features[name].get("dtype") in ("image", "video")]
        what = f"{both[0]!r} and {both[1]!r} would be the policy's {new!r}"
        if len(cameras) == 1:
            what += f", and only {cameras[0]!r} is a camera"
            # At fault is the one that was renamed; of two, the one that is not what the name says.
            out = max(rename_map.keys() & both, key=lambda name: (name in cameras) != (".image" in new))
            left = {name: to for name, to in rename_map.items() if name != out}
        else:
            out = next((name for name in both if name.startswith(OBS_PREFIX) and name not in rename_map), "")
            left = {**rename_map, out: f"{out}_unused"}
        advice = f"{as_flag(left)} to leave {out!r} out" if out else "a name of its own for each"
        raise TrainingError(f"{what}; give --rename_map {advice}")
    return renamed


def fill_features(settings: TrainSettings, features: dict[str, Any], names: dict[str, str]) -> None:
    """Fills empty ``input_features`` and ``output_features`` of the policy from the dataset, and compares declared ones.

    names   as ``policy_names`` returns them
    raises  TrainingError for a feature that is missing, too large, or of another size than is declared
    """
    config, found = settings.policy, policy_features(features, names)
    if not config.output_features:
        config.output_features = {k: f for k, f in found.items() if f.type is FeatureType.ACTION}
    if not config.input_features:
        config.input_features = {k: f for k, f in found.items() if f.type is not FeatureType.ACTION}
    _check_cameras(settings, found, names)
    for key, declared, limit in (
        (ACTION, config.action_feature, "max_action_dim"),
        (OBS_STATE, config.robot_state_feature, "max_state_dim"),
    ):
        if key not in found:
            raise TrainingError(_missing(settings, found, names, key))
        shape = found[key].shape
        size, field = size_of(shape), "output_features" if key == ACTION else "input_features"
        if key == ACTION and (len(shape) > 1 or shape == (1,)):
            raise TrainingError(
                f"{key!r} has {size} values in the dataset, SmolVLA trains on vectors of at least 2 (LeRobot reads one "
                "value as a number without a dimension): record it as one vector, a lone value beside a constant one"
            )
        if declared is not None and declared.shape != shape:
            raise TrainingError(
                f"{key!r} has {size} values in the dataset and {size_of(declared.shape)} in the policy's configuration; for "
                f"another robot than the checkpoint's give --policy.{field}=null, which takes the dataset's features"
            )
        if shape[-1] > getattr(config, limit):
            fresh = "; this needs fresh weights: leave out --policy.path" if settings.policy_path else ""
            raise TrainingError(
                f"{key!r} has {size} values in the dataset, the policy accepts at most {limit}={getattr(config, limit)}; "
                f"give --policy.{limit}={shape[-1]}{fresh}"
            )


def _missing(settings: TrainSettings, found: dict[str, Any], names: dict[str, str], key: str) -> str:
    """The message for a missing state or action, with another state to rename instead, of the same size if possible."""
    has = [name for name, new in names.items() if new in found]
    said = f"the dataset has no {key!r}, which SmolVLA trains on; it has {has}"
    states = [name for name in has if found[names[name]].type in (FeatureType.STATE, FeatureType.ENV)]
    if key == ACTION or not states or not settings.policy_path:
        return said
    declared = settings.policy.robot_state_feature
    near = min(states, key=lambda name: declared is None or found[names[name]].shape != declared.shape)
    return f"{said}. Give --rename_map {as_flag({**_renames(settings, names), near: key})} if that is the robot's state"


def _renames(settings: TrainSettings, names: dict[str, str]) -> dict[str, str]:
    """``rename_map`` without what the dataset does not have, such as a name with a typo."""
    return {old: new for old, new in settings.rename_map.items() if old in names}


def _check_cameras(settings: TrainSettings, found: dict[str, PolicyFeature], names: dict[str, str]) -> None:
    """TrainingError unless the dataset has all cameras of the policy, or ``rename_map`` gives each of its own a place."""
    config = settings.policy
    is_camera = {name for name, feature in found.items() if feature.type is FeatureType.VISUAL}
    cameras = {old: new for old, new in names.items() if new in is_camera}
    if not cameras:
        raise TrainingError(f"the dataset has no camera, SmolVLA needs one; its features are {sorted(names)}")
    expected = [key for key in config.image_features if "empty_camera" not in key]
    missing = [key for key in expected if key not in cameras.values()]
    left_out = missing[config.empty_cameras :]
    present = set(cameras.values()) & set(config.image_features)
    if present and not left_out:
        return
    if present and settings.rename_map and set(cameras.values()) <= set(expected):
        # Every camera of the dataset has its place. LeRobot trains so too, without the policy's other cameras.
        logger.warning(
            "the dataset lacks the cameras %s of the policy, which is trained without them; --policy.empty_cameras=%d puts "
            "masked blank frames in their place", left_out, len(missing),
        )  # fmt: skip
        return
    ways = ["--policy.input_features=null to take the dataset's features"]
    if present:  # SmolVLA needs at least one real frame beside the blank ones
        ways.insert(0, f"--policy.empty_cameras={len(missing)} to train with blank frames in their place")
    if missing and settings.policy_path:
        unplaced = [old for old, new in cameras.items() if new not in expected] or list(cameras)
        flag = as_flag({**_renames(settings, names), **dict(zip(unplaced, missing, strict=False))})
        ways.insert(0, f"--rename_map {flag} if names differ (with all renamed, the rest is left out)")
    what = f"the dataset lacks the policy's cameras {missing}" if missing else "the policy declares no camera"
    raise TrainingError(f"{what}; the dataset has {list(cameras)}. Give {', or '.join(ways)}")


def how_to_remove(names: list[str]) -> str:
    """Advice to remove features from the dataset."""
    edit = f'lerobot-edit-dataset --operation.type remove_feature --operation.feature_names "{names}"'
    return f"take it out of the dataset with `{edit}` (see its --help)"


def size_of(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def as_flag(value: Any) -> str:
    """A value as it is typed on a command line."""
    return f"'{json.dumps(value)}'"


def policy_features(features: dict[str, Any], names: dict[str, str]) -> dict[str, PolicyFeature]:
    """The dataset's features under the policy's names, cameras as (channels, height, width)."""
    from lerobot.utils.feature_utils import dataset_to_policy_features

    found = dataset_to_policy_features({names[key]: feature for key, feature in features.items()})
    return {k: PolicyFeature(FeatureType(f.type.value), tuple(f.shape)) for k, f in found.items()}
