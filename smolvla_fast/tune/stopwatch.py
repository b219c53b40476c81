"""Medians of alternating rounds: on an NVIDIA GPU each sweep is a captured graph, as it is in a chunk."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..engine.cuda_graphs import driver_for
from ..measure.rounds import percentile, timed_ms

Runs = dict[str, Callable[[], float]]
"""by name: runs once and gives its milliseconds"""
Times = dict[str, list[float]]

FLOOR = 0.02
"""A difference below this share of the default's time is no difference: clocks drift by more between two minutes."""
REPLAYS = 20
"""Replays of a graph in one timing: waiting for a GPU takes longer than many a kernel."""


class Stopwatch:
    """Times what is called on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._driver = driver_for(device)

    def prepared(self, sweep: Callable[[], Tensor]) -> Callable[[], float]:
        """The sweep as something that runs it once and gives its milliseconds; what it builds and compiles is built now.

        raises  whatever the sweep raises, or its capture
        """
        driver = self._driver
        if driver is None:
            sweep()
            return lambda: timed_ms(sweep, self.device)[0]
        recording, _ = driver.capture(sweep)

        def replays() -> None:
            for _ in range(REPLAYS):
                driver.replay(recording)

        return lambda: timed_ms(replays, self.device)[0] / REPLAYS


def p50(rounds: Sequence[float]) -> float:
    return statistics.median(rounds)


def scatter(rounds: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    return (percentile(rounds, 0.75) - percentile(rounds, 0.25)) / 2


def is_faster(rounds: Sequence[float], default: Sequence[float]) -> bool:
    """Whether the first are ahead by more than either scatters, and by more than ``FLOOR``."""
    ahead = p50(default) - p50(rounds)
    return ahead > max(scatter(rounds), scatter(default), FLOOR * p50(default))


def rounds_of(runs: Runs, more: Callable[[int, Times], bool]) -> Times:
    """Rounds in which each run gives its milliseconds once, in turn from both ends, as long as ``more`` says so.

    more  rounds so far, times so far -> whether another is wanted; it may take hopeless runs out of ``runs``
    """
    times: Times = {name: [] for name in runs}
    count = 0
    while more(count, times):
        for name in list(runs)[:: 1 if count % 2 == 0 else -1]:
            times[name].append(runs[name]())
        count += 1
    return times
