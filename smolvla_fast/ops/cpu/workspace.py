"""Memory that the denoise loop uses again: while a workspace is lent, ops of backend ``cpu`` write where they wrote before.

Outside, every result of an op is fresh. Inside, it holds until the same op is called again, and a residual is added to in
place: what the loop wants, which reads each result once, and nobody else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_of_thread = threading.local()


class Workspace:
    """Buffers by role and dtype. One engine may compute chunks in several threads at once: each borrows a set of its own."""

    def __init__(self) -> None:
        self._sets: list[dict[tuple[str, torch.dtype], Tensor]] = []
        self._free: list[dict[tuple[str, torch.dtype], Tensor]] = []

    @contextmanager
    def lent(self) -> Iterator[None]:
        try:
            buffers = self._free.pop()
        except IndexError:
            buffers = {}
            self._sets.append(buffers)
        before = getattr(_of_thread, "buffers", None)
        _of_thread.buffers = buffers
        try:
            yield
        finally:
            _of_thread.buffers = before
            self._free.append(buffers)

    @property
    def bytes(self) -> int:
        return sum(each.nbytes for buffers in list(self._sets) for each in list(buffers.values()))


def is_lent() -> bool:
    return getattr(_of_thread, "buffers", None) is not None


def buffer(role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Where to write a result on the CPU: this role's memory in the workspace that is lent, else fresh."""
    buffers = getattr(_of_thread, "buffers", None)
    if buffers is None:
        return torch.empty(shape, dtype=dtype)
    found = buffers.get((role, dtype))
    if found is None or found.shape != shape:
        # A tensor made under inference_mode could not be written by a later chunk outside it.
        with torch.inference_mode(False):
            found = buffers[role, dtype] = torch.empty(shape, dtype=dtype)
    return found
