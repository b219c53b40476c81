"""The pytest plugin of the suites: flags, what they measure with, and the policies under test."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import flags
from benchmarks.harness.measure import Measure
from benchmarks.harness.roof import Ceilings, ceilings_once
from benchmarks.harness.setup import BenchmarkSetup
from smolvla_fast.cli.subject import resolve_device
from smolvla_fast.measure import system

MEASURE: pytest.StashKey[Measure] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smolvla_fast")
    flags.add_to(group.addoption)
    group.addoption("--choose", metavar="EXPRESSION", default="", help="as -k, of benchmarks and variants")
    group.addoption("--results", type=Path, help="where the JSON goes, after every case")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    path, choose = config.getoption("--results"), config.getoption("--choose")
    config.stash[MEASURE] = Measure(config, path, system.facts(), flags.seconds(config.option), choose)


def pytest_collection_finish(session: pytest.Session) -> None:
    measure = session.config.stash[MEASURE]
    measure.cases = len(session.items)
    within = f"within {measure.left / 60:.1f} minutes; what there is no time for is left out by name"
    print(f"{measure.cases} cases, {within}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    measure = session.config.stash[MEASURE]
    measure.interrupted = exitstatus == pytest.ExitCode.INTERRUPTED
    measure.save()
    if measure.red and not measure.interrupted:
        session.exitstatus = 1


def rounds(config: pytest.Config, few: int = 3, many: int = 20) -> int:
    return config.getoption("--rounds") or (many if config.getoption("--full") else few)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return resolve_device(pytestconfig.getoption("--device") or "auto")


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config, device: torch.device) -> Ceilings:
    measure = pytestconfig.stash[MEASURE]
    path = measure.path and measure.path.with_name("ceilings.json")
    found = ceilings_once(path, device, small=pytestconfig.getoption("--size") == "tiny")
    measure.facts["ceilings"] = asdict(found)
    return found


@pytest.fixture(scope="session")
def make_setup(pytestconfig: pytest.Config, device: torch.device, ceilings: Ceilings) -> Any:
    """make_setup(layers=None): the policy; one at a time, for two would count in each other's memory."""
    held: dict[int | None, BenchmarkSetup] = {}
    size, layout, steps = map(pytestconfig.getoption, ("--size", "--layout", "--steps"))

    def make(layers: int | None = None) -> BenchmarkSetup:
        if layers not in held:
            held.clear()
            gc.collect()
            held[layers] = BenchmarkSetup(device, ceilings, size, layout, steps, layers)
        return held[layers]

    return make


@pytest.fixture
def measure(benchmark: Any, pytestconfig: pytest.Config) -> Iterator[Measure]:
    found = pytestconfig.stash[MEASURE]
    found.benchmark = benchmark
    yield found
    found.save()
    gc.collect()
