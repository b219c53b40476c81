"""Policies for the acceptance checks."""

from __future__ import annotations

from typing import Any

import pytest
from support.captured import recording
from support.policies import bf16_products, few_threads, noise, observation, origin, policy

__all__ = ["bf16_products", "few_threads", "noise", "observation", "origin", "policy", "recording"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny policy with its processors, as LeRobot saves them."""
    from offline.checkpoints import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_steps=3)
