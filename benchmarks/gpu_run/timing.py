"""Microseconds a launch, and the lock that keeps a GPU for one process while it times."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

LAUNCHES = 50
REPLAYS = 5


@contextlib.contextmanager
def gpu(alone: bool) -> Iterator[None]:
    """Inside, this process uses the GPU beside others that do so, or alone. Asked of other processes of this user."""
    with Path(tempfile.gettempdir(), f"smolvla_fast_gpu_{os.getuid()}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def us_a_launch(calls: Sequence[Callable[[], Any]], device: torch.device, launches: int = LAUNCHES) -> float:
    """µs from one launch of a graph to the next, its gap included: the best of REPLAYS replays.

    calls  gone through in turn, so that the weights of one are not in the caches for the next
    On a CPU, for a rehearsal: the wall time of a call.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        return 1e6 * (time.perf_counter() - start)
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)  # the inputs are there
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls[0]()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, stream=stream):
        for call in islice(cycle(calls), launches):
            call()
    graph.replay()
    found = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop))
    return 1e3 * min(found) / launches
