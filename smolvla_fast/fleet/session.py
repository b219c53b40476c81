"""What a fleet's front keeps of one client: its instructions, its latest observation, and which steps were answered."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lerobot.async_inference.configs import PolicyServerConfig
from lerobot.async_inference.helpers import TimedObservation, prepare_raw_observation
from lerobot.async_inference.policy_server import PolicyServer
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE

from .messages import Refused, read_instructions
from .replica import Arrays

MAX_TASK = 10_000
"""Characters; SmolVLA reads the first tokens alone."""


class Session(PolicyServer):
    """LeRobot's own server object, one a client: its rules say which observation is worth an answer and which is dropped.

    path, config  of the policy that is served      seed  of this client's noise
    """

    last_processed_obs: TimedObservation | None

    def __init__(self, server: PolicyServerConfig, path: str, config: Any, seed: int) -> None:
        super().__init__(server)
        self.path, self.policy_config, self.seed, self.answered = path, config, seed, 0
        self.arrived, self.receiving, self.answering = asyncio.Event(), asyncio.Lock(), asyncio.Lock()
        self.seen = time.monotonic()

    def instruct(self, data: bytes) -> None:
        wanted, policy = read_instructions(data), self.policy_config
        asked, served = f"{wanted.policy_type} {wanted.pretrained_name_or_path}", f"smolvla {self.path}"
        if asked != served or wanted.rename_map:
            raise Refused(f"asks for {asked}, names mapped by {wanted.rename_map}; served is {served}")
        features, (width,) = wanted.lerobot_features, policy.robot_state_feature.shape
        state, cameras = features.get(OBS_STATE), features.keys() - {OBS_STATE}
        names = state.get("names") if isinstance(state, dict) else None
        fits = isinstance(names, list | tuple) and [*map(type, names)] == [str] * width
        if not fits or not cameras or cameras - policy.image_features.keys() or wanted.actions_per_chunk < 1:
            raise Refused(
                f"has a state of {names}, cameras {sorted(map(str, cameras))}, {wanted.actions_per_chunk} actions; accepted "
                f"are {width} names, some of {sorted(policy.image_features)}, 1 action and more"
            )
        self.lerobot_features, self.actions_per_chunk = features, wanted.actions_per_chunk

    def offer(self, observation: TimedObservation) -> None:
        """Keeps the observation, in place of an older one, if LeRobot's rules want it answered. Raises ``Refused``."""
        seen = observation.get_observation()
        # A frame in place of a number is stacked, and one of many channels resized, into something enormous.
        for name in self.lerobot_features[OBS_STATE]["names"]:
            if not isinstance(seen.get(name), int | float | np.number):
                raise Refused(f"has {name} of {type(seen.get(name)).__name__}; accepted is a number")
        for key in self.lerobot_features.keys() - {OBS_STATE}:
            shape = np.shape(seen.get(key.removeprefix(f"{OBS_IMAGES}.")))
            if len(shape) != 3 or shape[2] != 3:
                raise Refused(f"has {key} of {shape}; accepted is a frame [height, width, 3]")
        if _lerobots(self._enqueue_observation, observation):
            self.arrived.set()

    @contextmanager
    def taking(self) -> Iterator[TimedObservation]:
        """The observation to answer. After an error it counts as not answered, and waits again unless it was refused or a
        newer one has come."""
        before, taken = self.last_processed_obs, self.observation_queue.get_nowait()
        self.arrived.clear()
        self.last_processed_obs = taken
        self._predicted_timesteps.add(taken.get_timestep())
        try:
            yield taken
        except BaseException as error:
            self.last_processed_obs = before
            self._predicted_timesteps.discard(taken.get_timestep())
            if not isinstance(error, Refused) and self.observation_queue.empty():
                self.observation_queue.put(taken)
                self.arrived.set()
            raise

    def prepare(self, observation: TimedObservation) -> tuple[Arrays, str, int]:
        """What a replica is sent, checked: in a batch it stands beside other clients'. Raises ``Refused``."""
        seen, cameras = observation.get_observation(), self.policy_config.image_features
        found = _lerobots(prepare_raw_observation, seen, self.lerobot_features, cameras)
        task = found.pop("task", None)
        if not isinstance(task, str) or len(task) > MAX_TASK:
            raise Refused(f"finds the task {task!r:.40}; accepted is a text of at most {MAX_TASK} characters")
        arrays = {name: value.numpy() for name, value in found.items()}
        for name, value in arrays.items():
            if not np.isfinite(value).all():
                raise Refused(f"finds {name} not finite; accepted are finite numbers")
        # The noise depends on the session's seed and the number of its chunks, not on a batch or a replica.
        return arrays, task, int(np.random.SeedSequence([self.seed, self.answered]).generate_state(1)[0])

    def pack(self, observation: TimedObservation, actions: np.ndarray) -> bytes:
        """The answer as LeRobot's clients read it."""
        # Copies: pickle else writes the whole chunk once for each action.
        rows = [torch.tensor(row) for row in actions[: self.actions_per_chunk]]
        self.answered += 1
        timestamp, timestep = observation.get_timestamp(), observation.get_timestep()
        return pickle.dumps(self._time_action_chunk(timestamp, rows, timestep))


def _lerobots(rule: Callable[..., Any], *asked: Any) -> Any:
    """What LeRobot's code makes of an observation. Raises ``Refused`` for any error of it."""
    try:
        return rule(*asked)
    except Exception as error:  # depends on what the client has sent
        raise Refused(f"does not fit its features: {type(error).__name__}: {error}") from error
