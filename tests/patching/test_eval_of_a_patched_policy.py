"""``eval()`` of a patched policy, which LeRobot calls before every action, does what stock's does and writes less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from support.policies import BOTH, make_policy
from torch import nn

import smolvla_fast


def modes(policy: Any) -> dict[str, bool]:
    return {name: module.training for name, module in policy.named_modules()}


@BOTH
@pytest.mark.parametrize("one", ["model", "model.state_proj", "model.vlm_with_expert.lm_expert"])
def test_modes_are_stocks(one: str) -> None:
    stock = make_policy("tiny")
    fast = smolvla_fast.patch(copy.deepcopy(stock))
    for change in (
        lambda policy: policy.train(),
        lambda policy: policy.eval(),
        lambda policy: setattr(policy.get_submodule(one), "training", True),
        lambda policy: policy.eval(),
        lambda policy: policy.get_submodule(one).train(),
        lambda policy: policy.model.train(False),
        lambda policy: policy.model.eval(),
    ):
        change(stock), change(fast)
        assert modes(fast) == modes(stock)
    assert fast.model.eval() is fast.model and fast.model.train(False) is fast.model


def test_modules_that_evaluate_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = smolvla_fast.patch(make_policy("tiny").eval())
    written: list[str] = []
    own = nn.Module.__setattr__

    def setattr_(self: nn.Module, name: str, value: Any) -> None:
        written.append(name)
        own(self, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", setattr_)
    policy.eval()
    assert written == ["training"], "the policy's own"
