"""A robot without hardware for the tiny SmolVLA policy: two cameras of 24 x 32 and six joints that go where they are told.

Imported by LeRobot as its robot plugins are; ``TinyRobotConfig`` beside ``TinyRobot`` is how LeRobot finds the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

JOINTS = tuple(f"joint{i}.pos" for i in range(6))
CAMERAS = ("camera1", "camera2")
FRAME = (24, 32, 3)


@RobotConfig.register_subclass("tiny")
@dataclass(kw_only=True)
class TinyRobotConfig(RobotConfig):
    pass


class TinyRobot(Robot):
    config_class = TinyRobotConfig
    name = "tiny"

    def __init__(self, config: TinyRobotConfig) -> None:
        super().__init__(config)
        self._connected = False
        self._rng = np.random.default_rng(0)
        self._joints = dict.fromkeys(JOINTS, 0.1)
        self.sent: list[dict[str, float]] = []

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        return {**dict.fromkeys(JOINTS, float), **dict.fromkeys(CAMERAS, FRAME)}

    @cached_property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(JOINTS, float)

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self._connected = True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def get_observation(self) -> dict[str, Any]:
        frames = {name: self._rng.integers(0, 256, FRAME, np.uint8) for name in CAMERAS}
        return {**self._joints, **frames}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self._joints = {name: float(np.clip(action[name], -2, 2)) for name in JOINTS}
        self.sent.append(dict(action))
        return action

    def disconnect(self) -> None:
        self._connected = False
