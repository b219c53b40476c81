"""A gymnasium environment for the tiny SmolVLA policy, registered as LeRobot's environment plugins are.

Two cameras of 24 x 32, a state and an action of six numbers. A step moves the state by the action; the reward weighs the
action's numbers, so the sum of rewards of an episode is a fingerprint of every action that the policy has chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

CAMERAS = ("camera1", "camera2")
FRAME = (24, 32, 3)
STEPS = 25
TASK = "pick up the red cube"


class TinyEnv(gym.Env):
    """Episodes of ``STEPS`` steps, or of ``length``."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    task = task_description = TASK

    def __init__(self, length: int = STEPS) -> None:
        self._max_episode_steps = length
        pixels = {name: gym.spaces.Box(0, 255, FRAME, np.uint8) for name in CAMERAS}
        state = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
        self.observation_space = gym.spaces.Dict({"pixels": gym.spaces.Dict(pixels), "agent_pos": state})
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._step = 0
        self._state = self.np_random.standard_normal(6).astype(np.float32)
        self._scene = self.np_random.integers(0, 256, (len(CAMERAS), *FRAME), np.uint8)
        return self._observe(), {"is_success": False}

    def _observe(self) -> dict[str, Any]:
        pixels = {name: np.roll(self._scene[i], self._step, axis=1).copy() for i, name in enumerate(CAMERAS)}
        return {"pixels": pixels, "agent_pos": self._state.copy()}

    def step(self, action: np.ndarray) -> Any:
        self._step += 1
        self._state = (0.9 * self._state + 0.1 * action).astype(np.float32)
        reward = float(np.dot(action, np.arange(1.0, 7.0)))
        done = self._step >= self._max_episode_steps
        return self._observe(), reward, done, False, {"is_success": done}

    def render(self) -> np.ndarray:
        return np.roll(self._scene[0], self._step, axis=1)


gym.register("lerobot_env_tiny/Reach", TinyEnv)


@EnvConfig.register_subclass("tiny")
@dataclass
class TinyEnvConfig(EnvConfig):
    task: str | None = "Reach"
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (6,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (6,)),
            **{f"pixels/{name}": PolicyFeature(FeatureType.VISUAL, FRAME) for name in CAMERAS},
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            **{f"pixels/{name}": f"observation.images.{name}" for name in CAMERAS},
        }
    )

    @property
    def package_name(self) -> str:
        return "lerobot_env_tiny"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}
