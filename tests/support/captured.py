"""A patched policy whose chunks are captured without a GPU: recorder.py's graph driver behind the real cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import smolvla_fast
from smolvla_fast import inference
from smolvla_fast.patch import engine_of
from smolvla_fast.testing.policies import make_noise, make_observation
from support.policies import chunk, make_policy
from support.recorder import RecorderDriver

RTC = ("inference_delay", "prev_chunk_left_over", "execution_horizon")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made in this test capture, and so look through the model behind a replay, as on a GPU."""
    monkeypatch.setattr(inference, "driver_for", lambda device: RecorderDriver())


class Captured:
    """A patched policy whose engine captures, beside a plain one with the same weights."""

    def __init__(self, precision: str = "exact", **settings: Any) -> None:
        self.plain, self.policy = (make_policy("tiny", **{"num_steps": 3, **settings}) for _ in range(2))
        smolvla_fast.patch(self.policy, precision=precision, backend="torch")
        if precision != "exact":
            smolvla_fast.patch(self.plain, precision=precision, backend="torch")
            self.engine_of(self.plain).graphs = None

    @staticmethod
    def engine_of(policy: Any) -> Any:
        return engine_of(policy.model)

    @property
    def driver(self) -> RecorderDriver:
        return self.engine_of(self.policy).graphs._driver

    def same(self, **observation: Any) -> bool:
        """Whether both give the same bits for one observation."""
        kwargs = {name: observation.pop(name) for name in list(observation) if name in RTC}
        noise = make_noise(self.plain, batch=observation.get("batch", 1))
        given = make_observation(self.plain, **observation)
        return torch.equal(
            chunk(self.policy, given, noise, **kwargs), chunk(self.plain, given, noise, **kwargs)
        )

    @property
    def status(self) -> Any:
        return smolvla_fast.status(self.policy)
