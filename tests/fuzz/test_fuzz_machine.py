"""Random interleavings of what people do to a policy, on a patched one and on its stock twin."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.copies import Original
from support.fuzz_cases import CASES, QUICK, attempt, rel_l2

import smolvla_fast
from smolvla_fast.patching.settings import DISABLE
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy
from smolvla_fast.verify import FP32_BOUND

TIERS = st.sampled_from(["exact", "fp32"])
_made: dict[int, Original] = {}


def _policy(seed: int) -> Any:
    if seed not in _made:
        _made[seed] = Original(make_policy("tiny", seed=seed, num_vlm_layers=2, num_steps=3))
    return _made[seed].copy()


class PolicyMachine(RuleBasedStateMachine):
    """``self.fast`` lives through all of it; ``self.stock`` only through what changes weights, queue or configuration."""

    @initialize(tier=TIERS)
    def start(self, tier: str) -> None:
        self.stock, self.fast = _policy(0), smolvla_fast.patch(_policy(0), precision=tier)
        self.tier: str | None = tier
        self.hook: Any = None
        self.queue_exact = True
        self.transposed = False

    def teardown(self) -> None:
        os.environ.pop(DISABLE, None)

    # What is done to the patched policy alone

    @rule(tier=TIERS)
    def patch(self, tier: str) -> None:
        assert smolvla_fast.patch(self.fast, precision=tier) is self.fast
        if not os.environ.get(DISABLE):
            self.tier = tier

    @rule(seed=st.integers(0, 99), tier=TIERS)
    def unpatch_and_patch_again(self, seed: int, tier: str) -> None:
        smolvla_fast.unpatch(self.fast)
        self.tier = None
        self.predict(seed, 1, 1)
        self.patch(tier)

    @rule()
    def shallow_copy(self) -> None:
        self.fast = copy.copy(self.fast)
        self.reset()

    @precondition(lambda self: self.hook is None)
    @rule(way=st.sampled_from([copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))]))
    def deepcopy_or_pickle(self, way: Any) -> None:
        before = self.fast
        self.fast = way(self.fast)
        for parameter in before.parameters():  # what is left behind must not be read any more
            parameter.data.fill_(float("nan"))

    @precondition(lambda self: self.hook is None)
    @rule(where=st.sampled_from(["lm_expert", "vlm", "lm_expert.layers.1.mlp"]))
    def hook_on(self, where: str) -> None:
        module = self.fast.model.vlm_with_expert.get_submodule(where)
        self.hook = module.register_forward_hook(lambda *_: None)

    @precondition(lambda self: self.hook is not None)
    @rule()
    def hook_off(self) -> None:
        self.hook.remove()
        self.hook = None

    @rule(on=st.booleans())
    def disable(self, on: bool) -> None:
        os.environ[DISABLE] = "1" if on else ""

    # What is done to both

    @rule(seed=st.integers(0, 2))
    def load_state_dict(self, seed: int) -> None:
        for policy in (self.stock, self.fast):
            policy.load_state_dict(_policy(seed).state_dict())

    @rule(seed=st.integers(0, 9))
    def train_step(self, seed: int) -> None:
        """In place, by the stock forward in both: equal losses to the bit."""
        losses = []
        for policy in (self.stock, self.fast):
            policy.train()
            batch = make_observation(policy, batch=2, seed=seed)
            batch["action"] = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(seed))
            torch.manual_seed(seed)
            loss, _ = policy(batch)
            trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=1e-2)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            policy.eval()
            losses.append(loss.detach())
        assert torch.equal(*losses)

    @rule(factor=st.sampled_from([0.97, 1.03]))
    def weights_through_data(self, factor: float) -> None:
        for policy in (self.stock, self.fast):
            for parameter in policy.parameters():
                parameter.data.copy_(parameter.data * factor)

    @rule()
    def transpose_a_weight(self) -> None:
        """Through ``data``: another matrix at the address where it lay. The engine takes contiguous ones alone."""
        self.transposed = not self.transposed
        for policy in (self.stock, self.fast):
            parameter = policy.model.action_time_mlp_out.weight
            parameter.data = parameter.data.T

    @rule(steps=st.integers(1, 4))
    def num_steps(self, steps: int) -> None:
        self.stock.config.num_steps = self.fast.config.num_steps = steps

    @rule()
    def reset(self) -> None:
        self.stock.reset()
        self.fast.reset()
        self.queue_exact = True

    # What is asked of both

    @rule(seed=st.integers(0, 99), cameras=st.integers(1, 2), batch=st.integers(1, 2))
    def predict(self, seed: int, cameras: int, batch: int) -> None:
        observation = make_observation(self.stock, seed=seed, cameras=cameras, batch=batch)
        noise = make_noise(self.stock, seed=seed, batch=batch)
        served = smolvla_fast.status(self.fast).calls_fast
        want, got = (attempt(policy, observation, noise=noise) for policy in (self.stock, self.fast))
        self._agree(got, want, self.serves_exactly)
        expected = served + self.accelerated if self.tier is not None else 0
        assert smolvla_fast.status(self.fast).calls_fast == expected

    @rule(seed=st.integers(0, 99), count=st.integers(1, 11))
    def select_actions(self, seed: int, count: int) -> None:
        observation, noise = make_observation(self.stock, seed=seed), make_noise(self.stock, seed=seed)
        for _ in range(count):
            if not self.stock._queues["action"]:
                self.queue_exact = self.serves_exactly
            want, got = (
                policy.select_action(dict(observation), noise=noise) for policy in (self.stock, self.fast)
            )
            self._agree(got, want, self.queue_exact)

    @property
    def accelerated(self) -> bool:
        hindered = self.hook is not None or self.transposed or os.environ.get(DISABLE)
        return self.tier is not None and not hindered

    @property
    def serves_exactly(self) -> bool:
        return not self.accelerated or self.tier == "exact"

    @staticmethod
    def _agree(got: Any, want: Any, exactly: bool) -> None:
        assert isinstance(got, torch.Tensor) and isinstance(want, torch.Tensor), (got, want)
        assert torch.equal(got, want) if exactly else rel_l2(got, want) <= FP32_BOUND, rel_l2(got, want)

    @invariant()
    def status_tells_the_truth(self) -> None:
        now = smolvla_fast.status(self.fast)
        assert now.active == self.accelerated, now
        assert now.precision == (self.tier if self.accelerated else "stock")
        if self.tier is not None and not self.accelerated:
            assert now.last_fallback is not None
            assert any(word in now.last_fallback for word in (DISABLE, "hook", "contiguous"))


def test_drawn_interleavings_match_stock() -> None:
    nightly = CASES > QUICK
    run_state_machine_as_test(
        PolicyMachine,
        settings=settings(
            max_examples=max(1, CASES // 12), stateful_step_count=25, deadline=None, derandomize=not nightly,
            database=None, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
