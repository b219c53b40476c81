"""Time on the device alone: of a whole chunk, and of its stages inside the captured graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from smolvla_fast import inference
from smolvla_fast.engine.timing import STAGES


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


class StageMarks:
    """Two events around each stage of a chunk; captured with it, they time every replay from inside the graph.

    On a CPU they are points of wall time, taken anew in every chunk.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: dict[str, tuple[Any, Any]] = {}

    def placed(self) -> Any:
        """Inside, chunks carry these marks, and so do the graphs that are captured there."""
        return patch.object(inference, "section", self._section)

    @contextmanager
    def _section(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        # The capture comes after its warm-up and replaces its marks.
        self._marks[name] = (start, self._mark())

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        # A graph records an event anew at each replay only if it is an external one.
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """ms by stage, and "total" from the first mark to the last, of the chunk that has just been waited for."""
        missing = ", ".join(stage for stage in STAGES if stage not in self._marks)
        assert not missing, f"no marks around {missing}: the engine does not call timing.section there"
        spans = {stage: self._marks[stage] for stage in STAGES}
        spans["total"] = (spans[STAGES[0]][0], spans[STAGES[-1]][1])
        ms = lambda start, stop: start.elapsed_time(stop) if self._cuda else 1e3 * (stop - start)  # noqa: E731
        return {name: ms(*span) for name, span in spans.items()}
