"""Policies for the acceptance checks, and one line a check at the end of the run."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from support.captured import recording
from support.checks import NO_TEST, STATEMENTS, line_of, where
from support.policies import bf16_products, few_threads, noise, observation, origin, policy

__all__ = ["bf16_products", "few_threads", "noise", "observation", "origin", "policy", "recording"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny policy with its processors, as LeRobot saves them."""
    from offline.checkpoints import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_steps=3)


_seen: dict[str, tuple[list[int], str]] = {}
"""Test -> its checks, and where it shows them; from the reports, which come from several processes or from one."""
_outcomes: dict[str, str] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        numbers = {number for mark in item.iter_markers("check") for number in mark.args}
        unknown = numbers - STATEMENTS.keys()
        if unknown:
            raise pytest.UsageError(f"{item.nodeid} is marked with check {unknown}; there are 1 to 63")
        if numbers:
            fixtures = getattr(item, "fixturenames", ())
            place = where(item.get_closest_marker("gpu") is not None, fixtures)
            item.user_properties.append(("checks", (sorted(numbers), place)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    checks = dict(report.user_properties).get("checks")
    if checks and (report.when == "call" or report.outcome != "passed"):
        _seen[report.nodeid] = checks
        before = _outcomes.get(report.nodeid)
        _outcomes[report.nodeid] = before if before == "failed" else report.outcome


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for test, (numbers, place) in _seen.items():
        for number in numbers:
            found[number].append((_outcomes[test], place))
    if not found:
        return
    terminalreporter.section("acceptance checks")
    for number, text in STATEMENTS.items():
        if number in found or number in NO_TEST:
            terminalreporter.line(f"{number:2} {line_of(number, found.get(number, []))}  {text[:60]}")
