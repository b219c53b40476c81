"""A pytest plugin: of the collected tests, those of one process among several. SMOLVLA_SHARD=1/4 is the second of four."""

from __future__ import annotations

import os
from typing import Any

import pytest


@pytest.hookimpl(trylast=True)  # behind -m and -k: what they leave is shared out evenly
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    mine, count = map(int, os.environ["SMOLVLA_SHARD"].split("/"))
    others = [item for place, item in enumerate(items) if place % count != mine]
    items[:] = items[mine::count]
    config.hook.pytest_deselected(items=others)
