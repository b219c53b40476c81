"""The CUDA side of ``graphs.py``: capture on a stream and in a memory pool of its own, replay on the caller's stream."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Recording:
    """graph    the instantiated graph; it owns its memory pool
    bytes    what its pool reserved      nodes  launches, copies and fills in it, None where CUDA does not tell
    """

    graph: torch.cuda.CUDAGraph
    bytes: int
    nodes: int | None


class CudaDriver:
    """See ``graphs.Driver``."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._stream: torch.cuda.Stream | None = None

    def busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def capture(self, run: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
            caller = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                # Compiles kernels, makes library handles and workspaces: none of it may happen in a capture.
                run()
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            graph = _new_graph()
            before = torch.cuda.memory_reserved(self._device)
            try:
                output = self._record(graph, run)
            finally:
                # A capture that fails leaves its own stream as this thread's current one.
                torch.cuda.set_stream(caller)
            reserved = max(0, torch.cuda.memory_reserved(self._device) - before)
            nodes = _count_nodes(graph)
            if nodes is not None:
                graph.instantiate()
            caller.wait_stream(self._stream)
            return Recording(graph, reserved, nodes), output

    def _record(self, graph: torch.cuda.CUDAGraph, run: Callable[[], Tensor]) -> Tensor:
        cause: Exception | None = None
        try:
            # thread_local: another thread's CUDA calls do not spoil the capture, nor the capture theirs.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    return run()
                except Exception as error:
                    cause = error
                    raise
        except Exception:
            # Ending a broken capture raises an error of its own, which says less than the one that broke it.
            if cause is not None:
                raise cause from None
            raise

    def replay(self, recording: Recording) -> None:
        recording.graph.replay()

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def release(self) -> None:
        gc.collect()
        # An error that a broken capture left behind is reported by the next call and thereby cleared.
        with torch.cuda.device(self._device), contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()


def _new_graph() -> torch.cuda.CUDAGraph:
    """A graph whose nodes can be counted before it is instantiated, where this torch offers that (2.8 and later)."""
    try:
        return torch.cuda.CUDAGraph(keep_graph=True)
    except TypeError:
        return torch.cuda.CUDAGraph()


def _count_nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    raw = getattr(graph, "raw_cuda_graph", None)
    if raw is None:
        return None
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').split('.')[0]}")
        count = ctypes.c_size_t(0)
        handle = ctypes.c_void_p(raw())
        return None if runtime.cudaGraphGetNodes(handle, None, ctypes.byref(count)) else int(count.value)
    except (OSError, AttributeError, RuntimeError):
        return None
