"""A second stream of a capture: what is queued on it becomes a parallel branch of the graph. On an H200 the
chunk took 11.33 ms with it, 12.09 without, and had equal bits (benchmarks/results/contacts).

Memory stays right by three rules, in a capture and in the eager run ahead of it. torch's allocator gives a freed block to
the next tensor of the stream that the block was made on, and asks no other stream whether it has read it:

- What is made on the main stream and read on the side is held until the main stream has waited for the side. What the main
  stream then writes there comes behind the side's last read.
- What is made on the side is given to others by the side alone, and the side queues nothing before it has waited for the
  main stream (``beside``). So what the main stream still reads of it has been read by then.
- Both streams belong to one graph, as in ``cuda_driver``. No other work is ever queued on either.

What is made and read on one stream needs no rule. What is kept by stream, cuBLAS's workspaces and the eager counters of
``kernels/counters.py``, is one graph's alone by the third. In a capture both streams take memory from the graph's own pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor


class Side(Protocol):
    """A queue beside the main one. Whoever uses it ends with ``join``."""

    def beside(self, *read: Tensor) -> AbstractContextManager[None]:
        """Inside, work is queued on the side, behind all that the main queue has by now. read: what it reads and nobody else
        keeps until ``join``."""

    def join(self) -> None:
        """The main queue waits for all of the side's work; only then what was read there is let go."""


class SideStream:
    """A ``Side`` of CUDA streams: a fork and a join by events, which a capture follows from stream to stream."""

    def __init__(self, main: torch.cuda.Stream, side: torch.cuda.Stream) -> None:
        self._main, self._side = main, side
        self._held: list[Tensor] = []

    def is_beside_current(self) -> bool:
        return torch.cuda.current_stream() == self._main

    @contextmanager
    def beside(self, *read: Tensor) -> Iterator[None]:
        self._held.extend(read)
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        self._main.wait_stream(self._side)
        self._held.clear()


_offered: ContextVar[Side | None] = ContextVar("smolvla_fast_side", default=None)


@contextmanager
def offered(side: Side | None) -> Iterator[None]:
    """Inside, a capture and its warm-up run, which may use this side."""
    token = _offered.set(side)
    try:
        yield
    finally:
        _offered.reset(token)


def side_stream() -> Side | None:
    """The side of the capture under way, or of its warm-up; None elsewhere: in a caller's own capture, or on a stream that a
    captured function has forked by itself, which the side would not wait for."""
    side = _offered.get()
    return None if isinstance(side, SideStream) and not side.is_beside_current() else side
