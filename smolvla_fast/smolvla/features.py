"""The names in batches and checkpoints: feature kinds, normalisation modes, keys of data.

Every enum is also a string: a member equals LeRobot's word for it, and is written to JSON as that word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

OBS_PREFIX = "observation."
OBS_STATE = "observation.state"
OBS_ENV_STATE = "observation.environment_state"
OBS_IMAGE = "observation.image"
OBS_IMAGES = "observation.images"
OBS_LANGUAGE_TOKENS = "observation.language.tokens"
OBS_LANGUAGE_ATTENTION_MASK = "observation.language.attention_mask"
OBS_SUBTASK_TOKENS = "observation.subtask.tokens"
OBS_SUBTASK_ATTENTION_MASK = "observation.subtask.attention_mask"
ACTION = "action"
REWARD = "next.reward"
DONE = "next.done"
TRUNCATED = "next.truncated"
INFO = "info"

_E = TypeVar("_E", bound=Enum)


class FeatureType(str, Enum):
    """What a feature is; images are ``VISUAL``."""

    STATE = "STATE"
    VISUAL = "VISUAL"
    ENV = "ENV"
    ACTION = "ACTION"
    REWARD = "REWARD"
    LANGUAGE = "LANGUAGE"


class NormalizationMode(str, Enum):
    """How a kind of feature is scaled before the model sees it."""

    MIN_MAX = "MIN_MAX"
    MEAN_STD = "MEAN_STD"
    IDENTITY = "IDENTITY"
    QUANTILES = "QUANTILES"
    QUANTILE10 = "QUANTILE10"


@dataclass
class PolicyFeature:
    """One entry of ``input_features`` or ``output_features``.

    shape  without batch and time: ``(channels, height, width)`` of a camera, ``(n,)`` of a state or action
    """

    type: FeatureType
    shape: tuple[int, ...]


def parse_enum(kind: type[_E], value: Any, field: str) -> _E:
    """``value`` as a member of ``kind``: a member, its word, or another package's enum of that word. Else ValueError."""
    word = value.value if isinstance(value, Enum) else value
    try:
        return kind(word)
    except ValueError:
        accepted = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"{field}: {word!r} is not one of {accepted}") from None


def parse_features(features: Mapping[str, Any] | None, field: str) -> dict[str, PolicyFeature] | None:
    """Features from JSON (``{"type": ..., "shape": [...]}``) or from any objects with ``type`` and ``shape``.

    Raises ValueError naming the field and the feature when an entry has neither form.
    """
    if features is None:
        return None
    if not isinstance(features, Mapping):
        raise ValueError(
            f"{field} must map feature names to a type and a shape, got {type(features).__name__}"
        )
    parsed = {}
    for name, feature in features.items():
        if isinstance(feature, Mapping):
            kind, shape = feature.get("type"), feature.get("shape")
        else:
            kind, shape = getattr(feature, "type", None), getattr(feature, "shape", None)
        if kind is None or not isinstance(shape, (list, tuple)) or not all(isinstance(n, int) for n in shape):
            raise ValueError(
                f"{field}[{name!r}] needs a 'type' and a 'shape' (a list of integers), got {feature!r}"
            )
        parsed[str(name)] = PolicyFeature(
            parse_enum(FeatureType, kind, f"{field}[{name!r}].type"), tuple(shape)
        )
    return parsed
