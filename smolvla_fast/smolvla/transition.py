"""Transitions, the data of a processor pipeline, and their conversion from and to batches and actions.

A transition is a dictionary with the keys of ``TransitionKey``. Conversions correspond to LeRobot's
``processor/converters.py``; keys it does not recognise are dropped in the same way.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import Tensor

from .features import ACTION, DONE, INFO, OBS_PREFIX, REWARD, TRUNCATED

Transition = dict[str, Any]

COMPLEMENTARY_KEYS = (
    "task", "index", "task_index", "episode_index", "timestamp", "language_persistent", "language_events",
    "messages", "message_streams", "target_message_indices",
)  # fmt: skip


class TransitionKey(str, Enum):
    OBSERVATION = "observation"
    ACTION = "action"
    REWARD = "reward"
    DONE = "done"
    TRUNCATED = "truncated"
    INFO = "info"
    COMPLEMENTARY_DATA = "complementary_data"


def create_transition(
    observation: dict[str, Any] | None = None,
    action: Tensor | None = None,
    reward: Any = 0.0,
    done: Any = False,
    truncated: Any = False,
    info: dict[str, Any] | None = None,
    complementary_data: dict[str, Any] | None = None,
) -> Transition:
    return {
        TransitionKey.OBSERVATION: observation,
        TransitionKey.ACTION: action,
        TransitionKey.REWARD: reward,
        TransitionKey.DONE: done,
        TransitionKey.TRUNCATED: truncated,
        TransitionKey.INFO: {} if info is None else info,
        TransitionKey.COMPLEMENTARY_DATA: {} if complementary_data is None else complementary_data,
    }


def _check_action(action: Any) -> None:
    if not isinstance(action, Tensor):
        raise ValueError(f"'action' must be a torch tensor, got {type(action).__name__}")


def batch_to_transition(batch: dict[str, Any]) -> Transition:
    """A batch of a data loader or a robot, sorted into observation, action and complementary data."""
    if not isinstance(batch, dict):
        raise ValueError(f"the preprocessor takes a dictionary of named values, got {type(batch).__name__}")
    if batch.get(ACTION) is not None:
        _check_action(batch[ACTION])
    complementary = {key: value for key, value in batch.items() if "_is_pad" in key}
    complementary.update((key, batch[key]) for key in COMPLEMENTARY_KEYS if key in batch)
    return create_transition(
        observation={key: value for key, value in batch.items() if key.startswith(OBS_PREFIX)} or None,
        action=batch.get(ACTION),
        reward=batch.get(REWARD, 0.0),
        done=batch.get(DONE, False),
        truncated=batch.get(TRUNCATED, False),
        info=batch.get(INFO, {}),
        complementary_data=complementary,
    )


def transition_to_batch(transition: Transition) -> dict[str, Any]:
    """Inverse of ``batch_to_transition``."""
    return {
        ACTION: transition.get(TransitionKey.ACTION),
        REWARD: transition.get(TransitionKey.REWARD, 0.0),
        DONE: transition.get(TransitionKey.DONE, False),
        TRUNCATED: transition.get(TransitionKey.TRUNCATED, False),
        INFO: transition.get(TransitionKey.INFO, {}),
        **(transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}),
        **(transition.get(TransitionKey.OBSERVATION) or {}),
    }


def policy_action_to_transition(action: Tensor) -> Transition:
    _check_action(action)
    return create_transition(action=action)


def transition_to_policy_action(transition: Transition) -> Tensor:
    _check_action(transition.get(TransitionKey.ACTION))
    return transition[TransitionKey.ACTION]
