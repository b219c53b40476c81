"""One thread, and bf16 products in bf16 on every processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the twin is LeRobot's own class")

from smolvla_fast import inference


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "why_bf16_is_slow", lambda: None)


@pytest.fixture(autouse=True)
def few_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
