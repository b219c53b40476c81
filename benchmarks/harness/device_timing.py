"""Time on the device alone: of a whole chunk, and of its stages inside the captured graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
    cycles = int(1.5 * host_ms * _cycles_a_ms(device))
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < rounds and (not found or time.perf_counter() < end):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        queue()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop))
    return found


def _cycles_a_ms(device: torch.device) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)  # wakes the clocks
    start.record()
    torch.cuda._sleep(10_000_000)
    stop.record()
    torch.cuda.synchronize(device)
    return 10_000_000 / start.elapsed_time(stop)


class StageMarks:
    """Two events around each stage of a chunk; captured with it, they time every replay from inside the graph.

    On a CPU they are points of wall time, taken anew in every chunk.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, tuple[Any, Any]] = {}

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Inside, chunks carry these marks, and so do the graphs that are captured there."""
        plain = inference.section
        inference.section = self._section
        try:
            yield
        finally:
            inference.section = plain

    @contextmanager
    def _section(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._marks[name] = (
            start,
            self._mark(),
        )  # the capture comes after its warm-up and replaces its marks

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        # A graph records an event anew at each replay only if it is an external one.
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """ms by stage, and "total" from the first mark to the last, of the chunk that has just been waited for."""
        missing = [stage for stage in STAGES if stage not in self._marks]
        assert not missing, (
            f"no marks around {', '.join(missing)}: the engine does not call timing.section there"
        )
        found = {stage: self._between(*self._marks[stage]) for stage in STAGES}
        return {**found, "total": self._between(self._marks[STAGES[0]][0], self._marks[STAGES[-1]][1])}

    def _between(self, start: Any, stop: Any) -> float:
        return 1e3 * (stop - start) if self._device.type != "cuda" else start.elapsed_time(stop)
