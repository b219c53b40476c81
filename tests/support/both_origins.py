"""Fixtures of the folders whose tests run on the classes of ``policies.origin``, unless they are marked otherwise."""

from __future__ import annotations

import pytest

from support import integer_products
from support.policies import bf16_products, few_threads, noise, observation, origin, policy

__all__ = [
    "bf16_products",
    "both_origins",
    "few_threads",
    "noise",
    "observation",
    "origin",
    "policy",
    "products",
]


@pytest.fixture(autouse=True)
def both_origins(origin: str) -> None:
    """Also of the tests that ask for no policy."""


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tier int8 is served, whatever the processor."""
    integer_products.provide(monkeypatch)
