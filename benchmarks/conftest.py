"""Options, the policy under test, and the header that goes above every figure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gate import check_chunk, check_report
from benchmarks.machine import Ceilings, measure_ceilings
from smolvla_fast.cli import system
from smolvla_fast.cli.measure import as_stock

HEADER: pytest.StashKey[Any] = pytest.StashKey()
# The compiler may reorder every sum. fp32: 1e-4 is far above what that can do, far below a wrong mask;
# mixed: bf16 rounds at 4e-3, and 26 layers and 10 steps of other roundings stay below 5e-2.
COMPILED_BOUND = {"fp32": 1e-4, "mixed": 5e-2}


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
    found = measure_ceilings(device)
    pytestconfig.stash[HEADER]["ceilings"] = found.to_dict()
    return found


class Subject:
    """One policy for all suites, and for each number of cameras an observation with stock's chunk."""

    def __init__(self, config: pytest.Config, device: torch.device) -> None:
        from smolvla_fast import testing

        self.layout = config.getoption("--layout") or ("mixed" if device.type == "cuda" else "fp32")
        self.device, self.size = device, config.getoption("--size")
        self.policy = testing.make_policy(self.size, cameras=3, layout=self.layout, device=device)
        if config.getoption("--steps"):
            self.policy.config.num_steps = config.getoption("--steps")
        self.noise = testing.make_noise(self.policy)
        self._observations: dict[int, dict[str, Tensor]] = {}
        self._stock: dict[int, Tensor] = {}

    @property
    def group(self) -> str:
        steps = self.policy.config.num_steps
        return f"{self.size} size, {self.device.type}, {self.layout} weights, {steps} steps"

    def observation(self, cameras: int) -> dict[str, Tensor]:
        from smolvla_fast import testing

        if cameras not in self._observations:
            self._observations[cameras] = testing.make_observation(self.policy, cameras=cameras)
        return self._observations[cameras]

    def chunk(self, cameras: int) -> Tensor:
        chunk = self.policy.predict_action_chunk(dict(self.observation(cameras)), noise=self.noise.clone())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return chunk

    def stock_chunk(self, cameras: int) -> Tensor:
        if cameras not in self._stock:
            with as_stock(self.policy):
                self._stock[cameras] = self.chunk(cameras)
        return self._stock[cameras]

    def check(self, precision: str, cameras: int) -> dict[str, Any]:
        """The gate of a tier, with the policy patched to it."""
        import smolvla_fast
        from smolvla_fast.verify import FP32_BOUND

        before = smolvla_fast.status(self.policy)
        assert before.active, f"stock runs: {before.last_fallback}"
        if precision == "exact" or (precision == "fp32" and self.layout == "fp32"):
            bound = 0.0 if precision == "exact" else FP32_BOUND
            found = check_chunk(self.chunk(cameras), self.stock_chunk(cameras), bound)
        else:
            report = smolvla_fast.verify(self.policy, self.observation(cameras), noise=self.noise)
            found = check_report(report.to_dict())
        status = smolvla_fast.status(self.policy)
        assert status.calls_stock == 0, f"stock ran: {status.last_fallback}"
        return {**found, "backend": status.backend}

    def compute_dtype(self, variant: str) -> torch.dtype:
        """The dtype of a variant's large matrix products."""
        from smolvla_fast.precision import TIERS

        stored = torch.float32 if self.layout == "fp32" else torch.bfloat16
        tier = TIERS.get(variant)
        return stored if tier is None or tier.gemm_dtype is None else tier.gemm_dtype


@pytest.fixture(scope="session")
def subject(pytestconfig: pytest.Config, device: torch.device) -> Subject:
    return Subject(pytestconfig, device)


@pytest.fixture
def patched(subject: Subject):
    """patched(precision) patches the subject for the length of one test."""
    import smolvla_fast

    yield lambda precision: smolvla_fast.patch(subject.policy, precision=precision)
    smolvla_fast.unpatch(subject.policy)
