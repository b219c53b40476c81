"""Options, the policy under test, and the header that goes above every figure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness.machine import Ceilings, measure_ceilings
from benchmarks.harness.setup import Subject
from smolvla_fast.measure import system

HEADER: pytest.StashKey[Any] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smolvla_fast")
    group.addoption("--full", action="store_true", help="20 rounds a chunk and 100 an op, not 3 and 20")
    group.addoption("--rounds", type=int, help="rounds a chunk")
    group.addoption(
        "--with-compile", action="store_true", help="also time stock under torch.compile (minutes)"
    )
    group.addoption("--cameras", default="1,2,3", help="camera counts of the chunk suite (default: 1,2,3)")
    group.addoption("--steps", type=int, help="denoise steps")
    group.addoption("--size", choices=("full", "tiny"), default="full", help="policy size")
    group.addoption(
        "--layout", choices=("fp32", "mixed"), help="dtypes of the weights (CPU: fp32, GPU: mixed)"
    )
    group.addoption("--device", help="cpu or cuda (default: cuda where there is one)")
    group.addoption("--threads", type=int, help="CPU threads")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    config.stash[HEADER] = system.facts()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Our facts in place of the host's name."""
    machine_info.pop("node", None)
    machine_info["smolvla_fast"] = config.stash[HEADER]


def rounds(config: pytest.Config) -> int:
    return config.getoption("--rounds") or (20 if config.getoption("--full") else 3)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(
        pytestconfig.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    )


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config, device: torch.device) -> Ceilings:
    found = measure_ceilings(device, small=pytestconfig.getoption("--size") == "tiny")
    pytestconfig.stash[HEADER]["ceilings"] = found.to_dict()
    return found


@pytest.fixture(scope="session")
def subject(pytestconfig: pytest.Config, device: torch.device) -> Subject:
    option = pytestconfig.getoption
    return Subject(device, size=option("--size"), layout=option("--layout"), steps=option("--steps"))


@pytest.fixture
def patched(subject: Subject):
    """patched(precision) patches the subject for the length of one test."""
    import smolvla_fast

    yield lambda precision: smolvla_fast.patch(subject.policy, precision=precision)
    smolvla_fast.unpatch(subject.policy)
