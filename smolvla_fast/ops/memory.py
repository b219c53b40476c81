"""Memory that a stage uses again: it hands it to its ops, which write there in place of fresh memory.

An op takes its result and what it needs on the way from the ``Memory`` it is given, and gives the same buffers out when it
is called again. So a result holds until the next call of the same op with the same memory: what a loop wants that reads
each result once. The denoise loop keeps its memory from chunk to chunk; the vision tower, whose results are a hundred
times as large, from layer to layer alone. Without memory every result is fresh. A backend that makes its memory otherwise
ignores what it is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Memory:
    """Buffers by name and dtype, of one chunk or one run of the vision tower at a time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._parts: dict[str, Memory] = {}

    def part(self, name: str) -> Memory:
        """Memory apart from the rest: for a call whose result is still read when the same op is called again."""
        if name not in self._parts:
            self._parts[name] = Memory()
        return self._parts[name]

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The buffer of this name, of unspecified contents; made where there is none of this shape."""
        found = self._buffers.get((name, dtype))
        if found is None or found.shape != shape:
            # A tensor made under inference_mode could not be written by a later chunk outside it.
            with torch.inference_mode(False):
                found = self._buffers[name, dtype] = torch.empty(shape, dtype=dtype, device="cpu")
        return found

    @property
    def tensors(self) -> list[Tensor]:
        return [*self._buffers.values(), *(each for part in self._parts.values() for each in part.tensors)]


def part(memory: Memory | None, name: str) -> Memory | None:
    """What a call inside an op is given: ``Memory.part``, where there is memory."""
    return None if memory is None else memory.part(name)


def empty(memory: Memory | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Where a CPU op writes: its buffer of this name in ``memory``, or fresh memory."""
    return (
        torch.empty(shape, dtype=dtype, device="cpu") if memory is None else memory.empty(name, shape, dtype)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Also where a device or the CPU's allocator says so in its text alone."""
    words = r"out of memory|can't allocate memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
    )


class Workspace:
    """Memories of one engine, which may compute chunks in several threads at once: each chunk borrows one of its own."""

    def __init__(self) -> None:
        self._made: list[Memory] = []
        self._free: list[Memory] = []

    @contextmanager
    def lent(self) -> Iterator[Memory]:
        try:
            memory = self._free.pop()
        except IndexError:
            memory = Memory()
            self._made.append(memory)
        try:
            yield memory
        finally:
            self._free.append(memory)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for memory in list(self._made) for tensor in memory.tensors]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)
