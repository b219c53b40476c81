"""A pytest plugin: a line of JSON for each test as it begins and as it ends, so that a killed run names what it was at.

The file beside ``--results`` with the suffix .jsonl has the lines; ``--results`` has the counts and what failed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.run import EMPTY, write_line, write_whole


class Outcomes:
    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, path.with_suffix(".jsonl")
        self.counts: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self.running: list[str] = []

    def line(self, test: str, outcome: str, **more: Any) -> None:
        write_line(self.lines, {"test": test, "outcome": outcome, "at": round(time.time(), 2), **more})
        figures = {**self.counts, "tracebacks": self.failed, "under way": self.running}
        write_whole(self.path, {**EMPTY, "figures": figures})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = [nodeid]
        self.line(nodeid, "begins")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
        self.running = []
        said = {"traceback": str(report.longrepr)} if report.longrepr else {}
        if report.failed:
            self.failed[report.nodeid] = said["traceback"]
        self.line(report.nodeid, report.outcome, seconds=round(report.duration, 3), **said)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="what was found, after every test")


def pytest_configure(config: pytest.Config) -> None:
    # Of several processes that share the tests, the one that hands them out hears of each.
    if config.getoption("--results") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("--results").absolute()))
