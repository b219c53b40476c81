"""A chunk asks the modules whether one still trains before it writes to all of them."""

from __future__ import annotations

import pytest

from smolvla_fast.testing.policies import make_noise, make_observation, make_policy


@pytest.mark.parametrize("one", ["model.state_proj", "model.vlm_with_expert"])
def test_a_chunk_evaluates_where_one_module_trains(one: str) -> None:
    policy = make_policy("tiny", origin="ours").eval()
    policy.get_submodule(one).training = True
    policy.predict_action_chunk(make_observation(policy), noise=make_noise(policy))
    assert not any(module.training for module in policy.modules())
