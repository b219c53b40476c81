"""A whole action chunk: stock, stock compiled, and every tier, by cameras, batch and layers.

Wall time is that of ``predict_action_chunk`` until its chunk can be read. On a GPU also device time, what the GPU works on
it; the difference is the host's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from benchmarks.harness.flags import counts
from benchmarks.harness.gate import act
from benchmarks.harness.plugin import rounds
from benchmarks.harness.setup import Case
from smolvla_fast.measure.rounds import summary

DEVICE_SECONDS = 1.0


def device_rounds(
    queue: Callable[[], Any], device: torch.device, rounds: int, seconds: float, host_ms: float
) -> list[float] | None:
    """Milliseconds the device works on what ``queue`` queues; None on a CPU, which has no queue.

    host_ms  how long queueing may take: the device sleeps as long, so that no gap between launches is counted
    Holds for work that does not wait for the device on its way; where it does, its gaps are counted.
    """
    if device.type != "cuda":
        return None

    def timed(cycles: int, work: Callable[[], Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    # The first million wakes the clocks.
    cycles_a_ms = 10_000_000 / timed(1_000_000, lambda: torch.cuda._sleep(10_000_000))
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < rounds and (not found or time.perf_counter() < end):
        found.append(timed(int(1.5 * host_ms * cycles_a_ms), queue))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    default = {"--layers": (), "--batch": (1,), "--cameras": (1, 2, 3)}
    layers, batch, cameras = (counts(metafunc.config.getoption(f), f, default[f]) for f in default)
    # One policy after the other, and of each what matters most first.
    cases = [(c, b, n) for n, b, c in product(layers or (None,), batch, cameras)]
    ids = [f"{c}cameras-batch{b}" + (f"-{n}layers" if n else "") for c, b, n in cases]
    metafunc.parametrize(("cameras", "batch", "layers"), cases, ids=ids)


def test_chunk(
    measure: Any, make_setup: Any, pytestconfig: Any, cameras: int, batch: int, layers: int
) -> None:
    setup, case = make_setup(layers), Case(cameras, batch)
    group, few = setup.named("chunk", case), rounds(pytestconfig)
    for each in measure(group, setup.variants(case, pytestconfig.option), few, suite="chunk"):
        wall = summary([1e3 * seconds for seconds in each.stats.stats.data])
        with measure.attempt(each, group):
            queue = lambda policy=each.policy: act(policy, setup.inputs(cameras, batch))  # noqa: E731
            found = device_rounds(queue, setup.device, few, DEVICE_SECONDS, wall["max_ms"] + 1.0)
            if found is not None:
                figures = summary(found)
                host = wall["p50_ms"] - figures["p50_ms"]
                each.facts.update(device_ms=figures, device_rounds_ms=found, host_ms=host)
