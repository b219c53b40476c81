"""What a fleet's front keeps of one client: its instructions, its latest observation, and which steps were answered."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lerobot.async_inference.configs import PolicyServerConfig
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation, prepare_raw_observation
from lerobot.async_inference.policy_server import PolicyServer
from lerobot.utils.constants import OBS_STATE

from .messages import Refused, read_instructions
from .replica import Arrays


class Session(PolicyServer):
    """LeRobot's own server object, one a client: its rules say which observation is worth an answer and which is dropped.

    path, config  of the policy that is served      seed  of this client's noise
    """

    last_processed_obs: TimedObservation | None

    def __init__(self, server: PolicyServerConfig, path: str, config: Any, seed: int) -> None:
        super().__init__(server)
        self.path, self.policy_config, self.seed = path, config, seed
        self.answered = 0
        self.instructions: RemotePolicyConfig | None = None
        self.arrived, self.turn = asyncio.Event(), asyncio.Lock()
        self.receiving = False
        self.seen = time.monotonic()

    def instruct(self, data: bytes) -> None:
        wanted, config = read_instructions(data), self.policy_config
        asked = f"{wanted.policy_type} {wanted.pretrained_name_or_path}"
        if asked != f"smolvla {self.path}" or wanted.rename_map:
            raise Refused(
                f"asks for {asked}, names mapped by {wanted.rename_map}; served is smolvla {self.path}"
            )
        state, cameras = wanted.lerobot_features.get(OBS_STATE), wanted.lerobot_features.keys() - {OBS_STATE}
        names, (width,) = (
            state.get("names") if isinstance(state, dict) else None,
            config.robot_state_feature.shape,
        )
        if not cameras or cameras - config.image_features.keys() or len(names or ()) != width:
            raise Refused(
                f"has a state of {names} and cameras {sorted(map(str, cameras))}; accepted are {width} names and some "
                f"of {sorted(config.image_features)}"
            )
        self.instructions, self.lerobot_features = wanted, wanted.lerobot_features

    def offer(self, observation: TimedObservation) -> None:
        """Keeps the observation, in place of an older one, if LeRobot's rules want it answered. Raises ``Refused``."""
        for name in self.lerobot_features[OBS_STATE]["names"]:
            value = observation.get_observation().get(name)
            # A frame in place of a number would be stacked into something enormous.
            if not isinstance(value, int | float | np.number):
                raise Refused(f"has {name} of {type(value).__name__}; accepted is a number")
        try:
            if self._enqueue_observation(observation):
                self.arrived.set()
        except Exception as error:  # of LeRobot's code, for whatever the client has sent
            raise Refused(f"does not fit its features: {type(error).__name__}: {error}") from error

    @contextmanager
    def taking(self) -> Iterator[TimedObservation]:
        """The observation to answer. After an error it is as if it had not come; unless it was refused, it comes again."""
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
        features = self.policy_config.image_features
        try:
            found = prepare_raw_observation(observation.get_observation(), self.lerobot_features, features)
            task = found.pop("task")
            arrays = {name: value.numpy() for name, value in found.items()}
        except Exception as error:  # of LeRobot's code, for whatever the client has sent
            raise Refused(f"does not fit its features: {type(error).__name__}: {error}") from error
        for name, value in arrays.items():
            shape = tuple(features[name].shape) if name in features else value.shape
            if value.shape != shape or not np.isfinite(value).all():
                raise Refused(f"has {name} of {value.shape}; accepted are finite numbers of {shape}")
        if not isinstance(task, str):
            raise Refused(f"has a task of {type(task).__name__}; accepted is a text")
        # The noise depends on the session's seed and the number of its chunks, not on a batch or a replica.
        return arrays, task, int(np.random.SeedSequence([self.seed, self.answered]).generate_state(1)[0])

    def pack(self, observation: TimedObservation, actions: np.ndarray) -> bytes:
        """The answer as LeRobot's clients read it."""
        assert self.instructions is not None
        # Copies: pickle else writes the whole chunk once for each action.
        rows = [
            row.clone() for row in torch.from_numpy(np.array(actions[: self.instructions.actions_per_chunk]))
        ]
        self.answered += 1
        return pickle.dumps(
            self._time_action_chunk(observation.get_timestamp(), rows, observation.get_timestep())
        )
