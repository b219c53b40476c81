"""What every test of this folder shares; the policies themselves are in tests/policies.py."""

from __future__ import annotations

import integer_products
import pytest
from policies import (
    LEROBOT_FIRST,
    LEROBOT_ONLY,
    bf16_products,
    chunk,
    few_threads,
    make_policy,
    noise,
    observation,
    origin,
    policy,
    rel_l2,
)

__all__ = [
    "LEROBOT_FIRST", "LEROBOT_ONLY", "bf16_products", "chunk", "few_threads", "make_policy", "noise", "observation",
    "origin", "policy", "rel_l2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def both_origins(origin: str) -> None:
    """Every test of this folder runs on LeRobot's own class and on ours, unless it is marked otherwise."""


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tier int8 is served, whatever the processor."""
    integer_products.provide(monkeypatch)
