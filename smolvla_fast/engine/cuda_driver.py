"""The CUDA side of ``cuda_graphs``: capture on a stream and in a memory pool of its own, replay on the caller's stream."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .side_stream import SideStream, offered


@dataclass
class Recording:
    """graph    the instantiated graph; it owns its memory pool
    bytes    what its pool reserved      nodes  launches, copies and fills in it, None where CUDA does not tell
    """

    graph: torch.cuda.CUDAGraph
    bytes: int
    nodes: int | None


_idle: defaultdict[int, list[tuple[torch.cuda.Stream, torch.cuda.Stream]]] = defaultdict(list)
"""By device, streams of captures whose graphs are gone: the main one and the one beside it.

torch keeps one cuBLAS workspace for each handle and stream. Two graphs that are replayed at once must not share one, nor may
a graph share one with eager work. So a graph has streams on which nothing but its warm-up and its capture ever runs, and
whose workspaces are the graph's alone; the next graph inherits them. Clearing all workspaces around a capture instead, as
torch's own graphs do, takes them from under a thread that has looked one up and is about to launch.
"""


class CudaDriver:
    """See ``cuda_graphs.Driver``. ``GraphCache`` lets one capture run at a time."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)

    def busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def capture(self, run: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        with torch.cuda.device(self._device):
            idle = _idle[self._device.index]
            streams = idle.pop() if idle else (_new_stream(self._device), _new_stream(self._device))
            # What is left of the streams' last graph is done before their workspaces and counters serve another.
            torch.cuda.synchronize(self._device)
            try:
                with offered(SideStream(*streams)):
                    recording, output = self._on(streams[0], run)
            except BaseException:
                idle.append(streams)
                raise
            weakref.finalize(recording, idle.append, streams).atexit = False
            return recording, output

    def _on(self, stream: torch.cuda.Stream, run: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        caller = torch.cuda.current_stream(self._device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            # Compiles kernels, makes library handles and workspaces: none of it may happen in a capture.
            run()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        graph = _new_graph()
        before = torch.cuda.memory_reserved(self._device)
        with torch.cuda.stream(stream):
            output = self._record(graph, run)
        reserved = max(0, torch.cuda.memory_reserved(self._device) - before)
        nodes = _count_nodes(graph)
        if nodes is not None:
            graph.instantiate()
        caller.wait_stream(stream)
        return Recording(graph, reserved, nodes), output

    def _record(self, graph: torch.cuda.CUDAGraph, run: Callable[[], Tensor]) -> Tensor:
        pool = torch.cuda.graph_pool_handle()
        # thread_local: another thread's CUDA calls do not spoil the capture, nor the capture theirs.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        cause: Exception | None = None
        try:
            output = run()
        except Exception as error:
            cause = error
        try:
            graph.capture_end()
        except Exception as ending:
            self._mend(pool)
            # Ending a broken capture says less than what broke it.
            raise (cause or ending) from None
        if cause is not None:
            raise cause
        return output

    def _mend(self, pool: Any) -> None:
        """Undo what a capture began and, broken, could not end: the pool in the allocator, the mark on the generator."""
        index = self._device.index
        for call in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with contextlib.suppress(RuntimeError):
                call(index, pool)
        default, fresh = torch.cuda.default_generators[index], torch.Generator(self._device)
        with contextlib.suppress(RuntimeError):
            fresh.set_state(default.get_state())  # no random number is lost or drawn twice
            default.graphsafe_set_state(fresh.graphsafe_get_state())

    def replay(self, recording: Recording) -> None:
        recording.graph.replay()

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def collect(self) -> None:
        gc.collect()

    def release(self) -> None:
        # An error that a broken capture left behind is reported by the next call and thereby cleared. One that stays, as
        # after an illegal access, is for the caller's own next call to tell.
        for call in (lambda: torch.cuda.synchronize(self._device), torch.cuda.empty_cache):
            with torch.cuda.device(self._device), contextlib.suppress(RuntimeError):
                call()


@cache
def _runtime() -> ctypes.CDLL | None:
    """CUDA's runtime library, which torch has loaded; None where it has another name."""
    try:
        return ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').split('.')[0]}")
    except OSError:
        return None


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that torch gives to nobody else, as it does with those of its pool; one of the pool where CUDA gives none."""
    handle, non_blocking = ctypes.c_void_p(), 1
    runtime = _runtime()
    if runtime is None or runtime.cudaStreamCreateWithFlags(ctypes.byref(handle), non_blocking):
        return torch.cuda.Stream(device)
    return torch.cuda.ExternalStream(handle.value or 0, device)


def _new_graph() -> torch.cuda.CUDAGraph:
    """A graph whose nodes can be counted before it is instantiated, where this torch offers that (2.8 and later)."""
    try:
        return torch.cuda.CUDAGraph(keep_graph=True)
    except TypeError:
        return torch.cuda.CUDAGraph()


def _count_nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    raw, runtime = getattr(graph, "raw_cuda_graph", None), _runtime()
    if raw is None or runtime is None:
        return None
    try:
        count = ctypes.c_size_t(0)
        handle = ctypes.c_void_p(raw())
        return None if runtime.cudaGraphGetNodes(handle, None, ctypes.byref(count)) else int(count.value)
    except (AttributeError, RuntimeError):
        return None
