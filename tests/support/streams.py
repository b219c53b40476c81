"""CUDA's streams and allocator as far as order goes, without a GPU: every ATen call is noted on the stream it is queued on.

Raises ``Race`` where a call touches what another stream has written, or writes what it has read, with no event between them;
and where a stream may be given the memory of a freed tensor that another stream may still touch. torch's allocator gives a
freed block to the stream that it was made on, at once; here any new tensor may get any of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smolvla_fast.engine.side_stream import SideStream


class Race(AssertionError):
    """Two streams touch the same memory, and nothing says in which order."""


@dataclass
class Stream:
    """queued  its calls by now      seen  of the other stream, how many had been queued as this one last waited for it"""

    name: str
    queued: int = 0
    seen: int = 0

    def wait_stream(self, other: Stream) -> None:
        self.seen = other.queued


@dataclass
class Memory:
    """made_on  the stream that gets it when it is freed      touched  by stream, its last read and its last write"""

    made_on: str
    touched: dict[tuple[str, bool], int] = field(default_factory=dict)


class Streams(TorchDispatchMode):
    """Two streams and what is queued on them. calls: (stream, ATen's name)"""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.main, self.beside = Stream("main"), Stream("side")
        self.current = self.main
        self.calls: list[tuple[str, str]] = []
        self._live: dict[int, Memory] = {}
        self._freed: list[Memory] = []
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        self.side = SideStream(self.main, self.beside)  # type: ignore[arg-type]

    def synchronize(self) -> None:
        """The host waits for both, as ``CudaDriver`` does ahead of a capture."""
        self.main.wait_stream(self.beside)
        self.beside.wait_stream(self.main)

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage()._cdata for x in given}
        made = [
            x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in held
        ]
        if made or func._schema.is_mutable:  # else a view
            self.queue(
                func._schema.name, given, [*made, *(given[:1] if func._schema.is_mutable else [])], made
            )
        return out

    def queue(
        self, name: str, reads: list[Tensor], writes: list[Tensor], made: list[Tensor] | None = None
    ) -> None:
        """A launch on the current stream. made: results that are new memory."""
        here = self.current
        here.queued += 1
        self.calls.append((here.name, name))
        for memory in self._freed if made else []:
            if memory.made_on == here.name:
                self._ordered(
                    memory, True, f"{name} may be given memory that was freed while the other stream reads it"
                )
        if made:
            self._freed = [memory for memory in self._freed if memory.made_on != here.name]
        for written, tensors in ((False, reads), (True, writes)):
            for tensor in tensors:
                memory = self._memory(tensor)
                self._ordered(memory, written, f"{name} on the {here.name} stream")
                memory.touched[here.name, written] = here.queued

    def _ordered(self, memory: Memory, writes: bool, what: str) -> None:
        here = self.current
        for (stream, written), when in memory.touched.items():
            if stream != here.name and (written or writes) and when > here.seen:
                raise Race(f"{what}: call {when} of the {stream} stream is not waited for")

    def _memory(self, tensor: Tensor) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._live[key] = Memory(self.current.name)
            weakref.finalize(storage, lambda: self._freed.append(self._live.pop(key))).atexit = False
        return self._live[key]
