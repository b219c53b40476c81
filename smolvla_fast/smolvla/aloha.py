"""Converts between Aloha's joint and gripper conventions and those of SmolVLA's pretraining data.

Motors 0-6 are one arm, 7-13 the other, the gripper last. The pretraining data turns joints 1 and 2 the other way and has
grippers as an angle, normalised between two angles of a Trossen robot; Aloha reports the linear opening. All functions
return new tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOTORS = 14
_FLIPPED = [1, 2, 8, 9]
_GRIPPERS = [6, 13]

# Puppet gripper, linear opening in metres, and the geometry that turns it into an angle (Interbotix).
_LINEAR_CLOSED, _LINEAR_OPEN = 0.01844, 0.05800
_ARM_LENGTH, _HORN_RADIUS = 0.036, 0.022
# Angles in radians of 0 and 1: in the pretraining data, and in Aloha's.
_ANGLE_MIN, _ANGLE_MAX = 0.4, 1.5
_JOINT_CLOSED, _JOINT_OPEN = -0.6213, 1.4910


def normalize(x: Tensor, min_val: float, max_val: float) -> Tensor:
    return (x - min_val) / (max_val - min_val)


def unnormalize(x: Tensor, min_val: float, max_val: float) -> Tensor:
    return x * (max_val - min_val) + min_val


def safe_arcsin(value: Tensor) -> Tensor:
    return torch.arcsin(torch.clamp(value, -1.0, 1.0))


def gripper_to_angular(value: Tensor) -> Tensor:
    """Aloha's opening in [0, 1] to the normalised angle of the pretraining data."""
    linear = unnormalize(value, _LINEAR_CLOSED, _LINEAR_OPEN)
    sine = (_HORN_RADIUS**2 + linear**2 - _ARM_LENGTH**2) / (2 * _HORN_RADIUS * linear)
    return normalize(safe_arcsin(sine), _ANGLE_MIN, _ANGLE_MAX)


def gripper_from_angular(value: Tensor) -> Tensor:
    """The model's normalised angle to Aloha's normalised joint angle."""
    return normalize(unnormalize(value, _ANGLE_MIN, _ANGLE_MAX), _JOINT_CLOSED, _JOINT_OPEN)


def gripper_from_angular_inv(value: Tensor) -> Tensor:
    """Inverse of ``gripper_from_angular``."""
    return normalize(unnormalize(value, _JOINT_CLOSED, _JOINT_OPEN), _ANGLE_MIN, _ANGLE_MAX)


def _convert(x: Tensor, gripper, name: str) -> Tensor:
    if x.shape[-1] < MOTORS:
        raise ValueError(
            f"adapt_to_pi_aloha needs {MOTORS} motors in {name}, got {x.shape[-1]}; it is for bimanual "
            "Aloha robots only"
        )
    x = x.clone()
    for motor in _FLIPPED:
        x[..., motor] *= -1
    for motor in _GRIPPERS:
        x[..., motor] = gripper(x[..., motor])
    return x


def decode_state(state: Tensor) -> Tensor:
    """Robot to model, [..., 14]."""
    return _convert(state, gripper_to_angular, "observation.state")


def encode_actions(actions: Tensor) -> Tensor:
    """Model to robot, [..., 14]."""
    return _convert(actions, gripper_from_angular, "action")


def encode_actions_inv(actions: Tensor) -> Tensor:
    """Robot to model, [..., 14]: the targets of training."""
    return _convert(actions, gripper_from_angular_inv, "action")
