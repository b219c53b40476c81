"""Arrival counters of split-K launches: zeroed once a process, given to one launch at a time, and given back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock

import torch
from torch import Tensor

ALIGNED = 32
"""Triton compiles by alignment: a capture must meet the variant that its warm-up compiled."""
LEAST = 1024
"""Counters of a stream: as many as the launches of a chunk have tiles, so that few streams ask again."""


class Counters:
    """Counters of a device, all zero whenever no launch uses them."""

    NUMBER = 1 << 20

    def __init__(self, index: int) -> None:
        self.zeros = torch.zeros(self.NUMBER, dtype=torch.int32, device=torch.device("cuda", index))
        torch.cuda.current_stream(index).synchronize()  # once: launches of other streams will not wait for it
        self.used = 0
        self.of_stream: dict[int, Tensor] = {}
        self.returned: defaultdict[int, list[Tensor]] = defaultdict(list)

    def take(self, number: int) -> Tensor | None:
        """A slice of at least so many; None where there are none left."""
        number = -(-number // ALIGNED) * ALIGNED
        if self.returned[number]:
            return self.returned[number].pop()
        if self.used + number > self.NUMBER:
            return None
        self.used += number
        return self.zeros[self.used - number : self.used]


Held = list[tuple[Counters, Tensor]]
"""What the launches of a capture took."""

_of_device: dict[int, Counters] = {}
_lock = RLock()  # a collection of garbage under it may give counters back
_held: ContextVar[Held | None] = ContextVar("smolvla_fast_counters", default=None)


@contextmanager
def held_by_capture() -> Iterator[Held]:
    """Inside, what captured launches take is noted, to be given back when their graph goes."""
    held: Held = []
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)


def give_back(held: Held) -> None:
    """The launches that took them will never run again, and none of them is under way."""
    with _lock:
        while held:
            counters, taken = held.pop()
            counters.returned[taken.numel()].append(taken)


def arrivals(tiles: int, device: torch.device) -> Tensor | None:
    """Counters for one launch on the current stream, zero; None where a capture must make its own."""
    index = torch.cuda.current_device() if device.index is None else device.index
    capturing = torch.cuda.is_current_stream_capturing()
    with _lock:
        if index not in _of_device:
            if capturing:
                return None
            _of_device[index] = Counters(index)
        counters = _of_device[index]
        if capturing:
            mine, held = counters.take(tiles), _held.get()
            if mine is not None and held is not None:
                held.append((counters, mine))
            return mine
        stream = torch.cuda.current_stream(index).cuda_stream
        mine = counters.of_stream.get(stream)
        if mine is None or mine.numel() < tiles:
            mine = counters.take(1 << (max(tiles, LEAST) - 1).bit_length())
            if mine is not None:
                counters.of_stream[stream] = mine
        return mine
