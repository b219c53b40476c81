"""Stock, every tier and the peers on one policy: each is a twin that shares all weights and differs in who computes."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smolvla_fast
from smolvla_fast.measure.rounds import PeakMemory, timed_ms
from smolvla_fast.model.precision import TIERS
from smolvla_fast.testing import policies

CPU = torch.device("cpu")
MOST_CAMERAS = 4


def twin(policy: Any) -> Any:
    """The same weights under another policy object, which can be patched or made to run something else on its own."""
    other = copy.copy(policy)
    other._modules = {**policy._modules, "model": copy.copy(policy.model)}
    return other


@dataclass
class Contestant:
    """One row of the table.

    kind       "stock", "tier" or "peer"      policy  its twin
    precision  the tier whose gate and roof are its own; "stock" has fp32's
    facts      what is known beside its times: errors, backend, memory
    why_not    why it cannot run here: skipped; or why its result is wrong: red. Then it is not timed.
    """

    name: str
    kind: str
    precision: str
    policy: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    rounds_ms: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)
    skipped: str | None = None
    red: str | None = None

    @property
    def runs(self) -> bool:
        return self.skipped is None and self.red is None


class Arena:
    """The policy, its observations and noise.

    size      "full" or "tiny", fp32 weights      steps  denoise steps (None: the configuration's)
    cameras   how many of the policy's four are present
    """

    def __init__(self, size: str, cameras: int, steps: int | None) -> None:
        self.size, self.cameras = size, cameras
        self.policy = policies.make_policy(size, cameras=MOST_CAMERAS)
        if steps:
            self.policy.config.num_steps = steps

    def inputs(self, cameras: int | None = None, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """A structured observation and its noise."""
        observation = policies.make_observation(self.policy, cameras=cameras or self.cameras, seed=seed)
        return observation, policies.make_noise(self.policy, seed=seed)

    def stock(self) -> Contestant:
        return Contestant("stock", "stock", "stock", self.policy)

    def tiers(self) -> list[Contestant]:
        """Every tier but ``exact``, which is stock's own calls; those that cannot be served here say why."""
        found = []
        for tier in TIERS.values():
            if tier.stock_order:
                continue
            contestant = Contestant(tier.name, "tier", tier.name, twin(self.policy))
            try:
                smolvla_fast.patch(contestant.policy, precision=tier.name)
                status = smolvla_fast.status(contestant.policy)
                contestant.skipped = None if status.active else f"stock runs: {status.last_fallback}"
            except (RuntimeError, ValueError) as reason:
                contestant.skipped = str(reason)
            found.append(contestant)
        return found

    def peer(self, name: str, precision: str, sample_actions: Callable[[Any], Any]) -> Contestant:
        """A contestant whose ``sample_actions`` is made from its twin's model."""
        policy = twin(self.policy)
        policy.model.__dict__["sample_actions"] = sample_actions(policy.model)
        return Contestant(name, "peer", precision, policy)


def chunk(policy: Any, inputs: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    observation, noise = inputs
    return policy.predict_action_chunk(dict(observation), noise=noise.clone())


def first_chunk(contestant: Contestant, inputs: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    """The first chunk; notes its time and how far the process's memory rose above what was resident before."""
    _give_back()
    before = resident()
    memory = PeakMemory(CPU)
    first_ms, found = timed_ms(lambda: chunk(contestant.policy, inputs), CPU)
    peak = memory.bytes
    contestant.facts.update(
        first_ms=first_ms,
        peak_bytes=peak,
        added_bytes=None if peak is None or before is None else peak - before,
    )
    return found


def resident() -> int | None:
    """Bytes of this process in memory; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), None)


def _give_back() -> None:
    """Returns what the allocator keeps of freed memory, or one contestant's leavings would hide the next one's needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
