"""The plans that come with the package."""

from __future__ import annotations

import json

from smolvla_fast.engine import plan_files


def test_plans_that_ship_are_plans_under_their_own_names() -> None:
    """What was measured on our machines: each is read, and found by its key alone."""
    paths = sorted(plan_files.SHIPPED.glob("*.json"))
    assert paths
    for path in paths:
        key = json.loads(path.read_text())["key"]
        assert plan_files.path_of(key).name == path.name
        plan, reason = plan_files.find(key)
        assert reason is None and plan is not None and plan.origin
        other = {**key, "threads": key["threads"] + 1}
        assert plan_files.find(other)[0] is None
