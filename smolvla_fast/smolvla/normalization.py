"""Normalises states and actions by the statistics of the training data."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .features import (
    ACTION,
    OBS_STATE,
    FeatureType,
    NormalizationMode,
    PolicyFeature,
    parse_enum,
    parse_features,
)
from .processor_steps import ProcessorStep
from .statistics_names import other_names
from .transition import Transition, TransitionKey

logger = logging.getLogger(__name__)

REQUIRED_STATS = {
    NormalizationMode.MEAN_STD: ("mean", "std"), NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"), NormalizationMode.QUANTILE10: ("q10", "q90"),
}  # fmt: skip


WAY_OUT = (
    "What passes through as it is reaches the model, or the robot, in units of the other. Give the statistics of the "
    "training data, dataset_stats={feature: {'mean': ..., 'std': ...}}, or IDENTITY in config.normalization_mapping if "
    "that is meant"
)


def scale(x: Tensor, mode: NormalizationMode, low: Tensor, high: Tensor, eps: float, inverse: bool) -> Tensor:
    """``(x - mean) / (std + eps)``, or ``[low, high]`` to ``[-1, 1]``; inverse undoes it.

    low, high  mean and std for MEAN_STD, else the two ends of the range; broadcast against x
    eps        added to std, and used for a range of zero. The inverse of MEAN_STD multiplies by std alone, as in LeRobot
    """
    if mode is NormalizationMode.MEAN_STD:
        return x * high + low if inverse else (x - low) / (high + eps)
    span = high - low
    span = torch.where(span == 0, torch.tensor(eps, device=x.device, dtype=x.dtype), span)
    if not inverse:
        return 2 * (x - low) / span - 1
    # LeRobot orders the operations of the two modes differently, which changes the last bit.
    if mode is NormalizationMode.MIN_MAX:
        return (x + 1) / 2 * span + low
    return (x + 1) * span / 2 + low


def _to_tensors(stats: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Converts nested numbers, lists, arrays or tensors to tensors of full precision; drops entries of None."""
    tensors = {}
    for key, entries in stats.items():
        if entries is None:
            continue
        if not isinstance(entries, Mapping):
            raise ValueError(
                f"the statistics of {key!r} must map names like 'mean' to values, got {entries!r}"
            )
        tensors[key] = {name: _to_tensor(value) for name, value in entries.items() if value is not None}
    return tensors


def _to_tensor(value: Any) -> Tensor:
    # torch would round Python's doubles to fp32.
    exact = isinstance(value, (Tensor, np.ndarray, np.generic))
    return torch.as_tensor(value) if exact else torch.tensor(value, dtype=torch.float64)


def statistics_fault(
    key: str,
    feature: PolicyFeature,
    mode: NormalizationMode,
    stats: Mapping[str, Any] | None,
    file: str | None = None,
) -> str | None:
    """Why ``stats`` cannot normalise a feature; None where they can, being present, finite and of its size.

    file  the file they come from, as in ``other_names``
    """
    if mode is NormalizationMode.IDENTITY:
        return None
    entry = (stats or {}).get(key)
    hint = other_names(key, stats or {}, file) if entry is None else ""
    camera = feature.type is FeatureType.VISUAL
    shape = None if camera else feature.shape
    size = f"{feature.shape[0]} channels" if camera else f"{feature.shape[-1]} values"
    for name in REQUIRED_STATS[mode]:
        value = entry.get(name) if isinstance(entry, Mapping) else None
        fault = "is missing" if value is None else _value_fault(value, shape)
        if fault:
            return f"statistic {name!r} of {key!r}, of {size}, {fault}{hint}"
    return None


def _value_fault(value: Any, shape: tuple[int, ...] | None) -> str | None:
    try:
        tensor = _to_tensor(value).double()
    except (TypeError, ValueError, RuntimeError):
        return f"is {value!r}, no numbers"
    # LeRobot's statistics of a matrix have one number per column.
    fits = (
        shape is None
        or tensor.numel() == 1
        or (tensor.shape[-1:] == shape[-1:] and tensor.numel() in (shape[-1], math.prod(shape)))
    )
    return None if tensor.numel() and tensor.isfinite().all() and fits else f"is {tensor.tolist()}"


@dataclass
class NormalizerProcessorStep(ProcessorStep):
    """Scales observations and actions by the mode of their kind. Features without mode or statistics pass unchanged.

    A state or action that passes unchanged although its kind has a mode gets one warning.

    features  name -> ``PolicyFeature`` (or its JSON)        norm_map  kind of feature -> mode
    stats     name -> {"mean": ..., "std": ..., "min": ..., ...}; if given, ``load_state_dict`` does not replace them. They
              are kept as given, rounded once to the dtype of what they scale, and saved in fp32
    """

    registry_name: ClassVar[str] = "normalizer_processor"
    inverse: ClassVar[bool] = False

    features: dict[str, PolicyFeature] | None
    norm_map: dict[FeatureType, NormalizationMode]
    stats: dict[str, dict[str, Any]] | None = None
    device: torch.device | str | None = None
    eps: float = 1e-8
    normalize_observation_keys: set[str] | None = None
    _given: bool = field(default=False, init=False, repr=False)
    _checked: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.features = parse_features(self.features, f"{self.registry_name}.features") or {}
        self.norm_map = {
            parse_enum(FeatureType, kind, "norm_map"): parse_enum(
                NormalizationMode, mode, f"norm_map[{kind!r}]"
            )
            for kind, mode in self.norm_map.items()
        }
        if self.normalize_observation_keys is not None:
            self.normalize_observation_keys = set(self.normalize_observation_keys)
        self._given = bool(self.stats)
        self._set_stats(_to_tensors(self.stats or {}))

    def _set_stats(self, stats: dict[str, dict[str, Tensor]]) -> None:
        for key, feature in (self.features or {}).items():
            if feature.type is FeatureType.VISUAL:
                # [C, 1, 1], to broadcast over height and width.
                for name, value in stats.get(key, {}).items():
                    stats[key][name] = value.reshape(-1, 1, 1) if value.ndim == 1 else value
        self.stats = stats
        self._checked.clear()

    def fault(self, key: str, feature: PolicyFeature) -> str | None:
        """Why this step does not scale a feature; None where it does."""
        if feature.type is not FeatureType.ACTION:
            if key not in (self.features or {}):
                return (
                    f"{key!r} is not among the features {sorted(self.features or {})} of {self.registry_name}"
                )
            if self.normalize_observation_keys is not None and key not in self.normalize_observation_keys:
                return f"{key!r} is not among normalize_observation_keys={sorted(self.normalize_observation_keys)}"
        mode = self.norm_map.get(feature.type, NormalizationMode.IDENTITY)
        if mode is NormalizationMode.IDENTITY:
            return f"{self.registry_name} has IDENTITY for {feature.type.value}"
        return statistics_fault(key, feature, mode, self.stats)

    def skip_check(self, key: str) -> None:
        """Silences the warning about a feature: the caller has given it."""
        self._checked.add(key)

    def _check(self, key: str, kind: FeatureType, x: Any) -> None:
        if key in self._checked:
            return
        self._checked.add(key)
        if self.norm_map.get(kind, NormalizationMode.IDENTITY) is NormalizationMode.IDENTITY:
            return
        fault = self.fault(key, PolicyFeature(kind, tuple(x.shape)[-1:] or (1,)))
        if fault:
            logger.warning("%s is not normalised: %s. %s", key, fault, WAY_OUT)

    def __call__(self, transition: Transition) -> Transition:
        transition = dict(transition)
        observation = transition.get(TransitionKey.OBSERVATION)
        if observation is not None:
            observation = dict(observation)
            for key, feature in (self.features or {}).items():
                chosen = self.normalize_observation_keys is None or key in self.normalize_observation_keys
                if chosen and feature.type is not FeatureType.ACTION and key in observation:
                    observation[key] = self._scale(torch.as_tensor(observation[key]), key, feature.type)
            if not self.inverse and isinstance(observation.get(OBS_STATE), Tensor):
                self._check(OBS_STATE, FeatureType.STATE, observation[OBS_STATE])
            transition[TransitionKey.OBSERVATION] = observation
        action = transition.get(TransitionKey.ACTION)
        if action is not None:
            transition[TransitionKey.ACTION] = self._scale(action, ACTION, FeatureType.ACTION)
            self._check(ACTION, FeatureType.ACTION, action)
        return transition

    def _scale(self, x: Tensor, key: str, kind: FeatureType) -> Tensor:
        mode = self.norm_map.get(kind, NormalizationMode.IDENTITY)
        stats = (self.stats or {}).get(key)
        if mode is NormalizationMode.IDENTITY or stats is None:
            return x
        absent = [name for name in REQUIRED_STATS[mode] if name not in stats]
        if absent:
            raise ValueError(
                f"normalisation {mode.value} of {key!r} needs the statistics {list(REQUIRED_STATS[mode])}, "
                f"missing are {absent}, given are {sorted(stats)}"
            )
        low, high = (stats[name].to(device=x.device, dtype=x.dtype) for name in REQUIRED_STATS[mode])
        for end in (low, high):
            width = end.shape[-1] if kind is not FeatureType.VISUAL and end.ndim else 1
            if width not in (1, x.shape[-1]):
                raise ValueError(f"{key!r} has {x.shape[-1]} values, its statistics are for {width}")
        return scale(x, mode, low, high, self.eps, self.inverse)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "eps": self.eps,
            "features": {
                key: {"type": f.type.value, "shape": list(f.shape)}
                for key, f in (self.features or {}).items()
            },
            "norm_map": {kind.value: mode.value for kind, mode in self.norm_map.items()},
        }
        if self.normalize_observation_keys is not None:
            config["normalize_observation_keys"] = sorted(self.normalize_observation_keys)
        return config

    def state_dict(self) -> dict[str, Tensor]:
        named = (
            (f"{key}.{name}", v) for key, entry in (self.stats or {}).items() for name, v in entry.items()
        )
        return {name: value.to("cpu", torch.float32) for name, value in named}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Sets the statistics of a file, unless the constructor got those of another dataset."""
        if self._given:
            return
        stats: dict[str, dict[str, Tensor]] = {}
        for flat, value in state.items():
            key, dot, name = flat.rpartition(".")
            if not dot:
                raise ValueError(
                    f"statistics are named FEATURE.STATISTIC, such as 'action.mean'; {flat!r} has no dot"
                )
            stats.setdefault(key, {})[name] = value.to(device=self.device, dtype=torch.float32)
        self._set_stats(stats)


@dataclass
class UnnormalizerProcessorStep(NormalizerProcessorStep):
    """The inverse of ``NormalizerProcessorStep``: returns the model's actions in the robot's units."""

    registry_name: ClassVar[str] = "unnormalizer_processor"
    inverse: ClassVar[bool] = True
