"""CUDA graphs of whole chunks: captured once for each shape of call, replayed for every call of that shape.

A graph reads its inputs from fixed buffers and the weights where they lie, so a replay is right as long as no parameter
has moved (``change_detector`` asks that before, and what else has changed while the GPU works). What talks to CUDA is a
``Driver`` of seven calls; tests put one in its place that records and replays on the CPU.
"""

from __future__ import annotations

import os
import re
import threading
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..kernels.counters import give_back, held_by_capture

CAPACITY = 6
"""Graphs kept for one policy; the one unused for longest goes first. LeRobot's callers need one or two at a time, an
evaluation whose last batch is ragged three."""

Compute = Callable[[list[Tensor]], tuple[Tensor, Any]]
"""From the static inputs to the chunk, in device work alone: no host constants, no waiting; and a report of how it is
computed, which every replay gives again."""


class Graphed(NamedTuple):
    """The arguments of a call: its tensors, all else as a key, and the way back from other tensors."""

    tensors: list[Tensor]
    key: Hashable
    rebuild: Callable[[list[Tensor]], Any]

    @classmethod
    def of(cls, given: Any, settings: tuple[Any, ...]) -> Graphed:
        """settings  what else the captured work depends on"""
        leaves, spec = tree_flatten(given)
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        plain: list[Any] = [Tensor if isinstance(each, Tensor) else (type(each), each) for each in leaves]

        def rebuild(others: list[Tensor]) -> Any:
            left = iter(others)
            return tree_unflatten([next(left) if each is Tensor else each[1] for each in plain], spec)

        return cls(
            tensors, (settings, tuple(plain), repr(spec)), rebuild
        )  # not every torch since 2.4 can hash a TreeSpec


def math_flags() -> tuple[Any, ...]:
    """The caller's settings that a captured library call was chosen under."""
    return (
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


_of_user: ContextVar[dict[int, Any] | None] = ContextVar("smolvla_fast_capture", default=None)


@contextmanager
def inside_capture() -> Iterator[None]:
    """A captured function of a user runs inside: what is set around it was asked before it began."""
    token = _of_user.set({})
    try:
        yield
    finally:
        _of_user.reset(token)


def capture_of_user() -> dict[int, Any] | None:
    """What is kept for the run of such a function, or None outside."""
    return _of_user.get()


class CaptureFailed(RuntimeError):
    """This shape of call cannot be captured; the message says why. All memory of the attempt has been given back.

    details  the traceback of what broke the capture, as text
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


class Driver(Protocol):
    """What a capture needs of a device."""

    def busy(self) -> bool:
        """Whether the caller is itself capturing: then nothing is captured or replayed inside."""

    def capture(self, run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        """Run once to warm up, once to record. Returns the recording and its output; raises what ``run`` raises."""

    def replay(self, recording: Any) -> None:
        """Queue the recorded work behind the caller's."""

    def wait(self, mark: Any) -> None:
        """Let the caller's later work wait for a mark that another stream may have set."""

    def mark(self) -> Any:
        """A point in the caller's queue."""

    def collect(self) -> None:
        """Free what only cycles of references hold, tensors among it; may run anybody's ``__del__``."""

    def release(self) -> None:
        """Give memory of dropped recordings back, after a failure included, and clear the device's error state."""


@dataclass
class Graph:
    """One recording. bytes: its memory pool and static inputs; nodes: launches and copies in it, None where unknown; report:
    as ``Compute`` gave it."""

    recording: Any
    inputs: list[Tensor]
    output: Tensor
    bytes: int
    nodes: int | None
    report: Any
    done: Any = None


# Re-entrant, as a collection of garbage inside a capture may drop another policy's graphs.
_capturing = threading.RLock()


def not_capturing() -> AbstractContextManager[Any]:
    """Held around draws of random numbers: while any thread captures, torch refuses them to all."""
    return _capturing


class GraphCache:
    """The graphs of one engine. Threads may share it: what one call queues is queued as a whole."""

    def __init__(self, driver: Driver, capacity: int = CAPACITY) -> None:
        self._driver = driver
        self._capacity = capacity
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._failed: dict[Hashable, tuple[str, str]] = {}
        self._lock = threading.RLock()
        _caches.add(self)

    def run(self, key: Hashable, inputs: Sequence[Tensor], compute: Compute) -> tuple[Tensor, Any]:
        """The chunk for these inputs, a fresh tensor ordered behind the caller's stream, and its report.

        key      all that the work depends on besides the values of ``inputs``; shapes, layouts and dtypes are added here
        raises   CaptureFailed where this shape cannot be captured, at once after the first time
        """
        if self._driver.busy():
            return compute(list(inputs))
        key = _whole(key, inputs)
        with self._lock:
            if key in self._failed:
                raise CaptureFailed(*self._failed[key])
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._capture(key, inputs, compute)
            self._graphs.move_to_end(key)
            if graph.done is not None:
                self._driver.wait(graph.done)
            with torch.no_grad():
                for static, value in zip(graph.inputs, inputs, strict=True):
                    static.copy_(value, non_blocking=True)
                self._driver.replay(graph.recording)
                chunk = graph.output.clone()
            graph.done = self._driver.mark()
            return chunk, graph.report

    def try_again(self, key: Hashable, inputs: Sequence[Tensor]) -> None:
        """Forget that this shape could not be captured; the traceback is kept. For who has something else to try."""
        key = _whole(key, inputs)
        with self._lock:
            if key in self._failed:
                self._failed["first attempt", key] = self._failed.pop(key)

    def replays(self, key: Hashable, inputs: Sequence[Tensor]) -> bool:
        """Whether ``run`` would replay a graph, which reads what was read when it was captured and nothing else."""
        return not self._driver.busy() and _whole(key, inputs) in self._graphs

    def _capture(self, key: Hashable, inputs: Sequence[Tensor], compute: Compute) -> Graph:
        reports: list[Any] = []

        def record() -> Tensor:
            chunk, report = compute(statics)
            reports.append(report)
            return chunk

        # Buffers of an inference_mode caller could not be written by a later one outside it.
        with torch.inference_mode(False), torch.no_grad(), _capturing, held_by_capture() as held:
            try:
                statics = [value.clone() for value in inputs]
                recording, output = self._driver.capture(record)
            except Exception as error:
                statics = []
                # As text: the traceback itself holds the attempt's tensors.
                details = "".join(traceback.format_exception(error))
                self._failed[key] = f"CUDA graph capture failed: {_what(error)}", details
                give_back(held)
                failure: CaptureFailed | None = CaptureFailed(*self._failed[key])
            else:
                size = sum(each.nbytes for each in statics)
                pool, nodes = getattr(recording, "bytes", 0), getattr(recording, "nodes", None)
                graph = Graph(recording, statics, output, size + pool, nodes, reports[-1])
                # However it goes: evicted, cleared, or with its policy.
                weakref.finalize(graph, give_back, held).atexit = False
                self._graphs[key] = graph
                failure = None
        # Outside the handler: the traceback that holds the attempt's tensors is gone by now.
        if failure is not None:
            self._release()
            raise failure
        while len(self._graphs) > self._capacity:
            oldest = self._graphs.popitem(last=False)
            self._release()  # waits: nothing of it is under way any more when it goes
            del oldest
        return graph

    def _release(self) -> None:
        """Not while any thread captures, this one included: memory of the device cannot be given back then."""
        # Not under the lock: what is collected may unpatch another policy, and wait for a thread that waits for it.
        self._driver.collect()
        with _capturing:
            if not self._driver.busy():
                self._driver.release()

    def clear(self) -> None:
        """Drop every graph and every memory of a failure."""
        with self._lock:
            self._failed.clear()
            if self._graphs:
                self._release()  # waits: nothing of them is under way any more when they go
                self._graphs.clear()
                self._release()

    def _leave_to_parent(self) -> None:
        """In a forked child: forget the parent's graphs, without a call to a device that does not survive a fork."""
        _of_parents.append(self._graphs)
        self._graphs, self._failed, self._lock = OrderedDict(), {}, threading.RLock()

    @property
    def failures(self) -> list[str]:
        """The tracebacks of the shapes that could not be captured."""
        return [details for _, details in list(self._failed.values())]

    @property
    def count(self) -> int:
        return len(self._graphs)

    @property
    def bytes(self) -> int:
        with self._lock:
            return sum(graph.bytes for graph in self._graphs.values())

    @property
    def nodes(self) -> int | None:
        """Nodes of the graph used last."""
        with self._lock:
            return next(reversed(self._graphs.values())).nodes if self._graphs else None


def _whole(key: Hashable, inputs: Sequence[Tensor]) -> Hashable:
    # What lies otherwise is computed in another order: a convolution of channels-last frames.
    return key, tuple(
        (each.shape, each.is_contiguous() or each.stride(), each.dtype, each.device) for each in inputs
    )


_caches: weakref.WeakSet[GraphCache] = weakref.WeakSet()
_of_parents: list[Any] = []
"""Graphs that a forked child must not replay, nor destroy: they are the parent's."""


def _after_fork() -> None:
    global _capturing
    _capturing = threading.RLock()  # the parent's may be held by a thread that is not in the child
    for cache in list(_caches):
        cache._leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _what(error: BaseException) -> str:
    """An error in a line; of a kernel that does not compile its name, where Triton begins with a place in a source."""
    source = getattr(error, "src", None)
    lines = (str(error).strip() or "no message").splitlines()
    if not isinstance(source, str):
        return f"{type(error).__name__}: {lines[0]}"
    kernel = re.search(r"^\s*def (\w+)", source, re.MULTILINE)
    cause = str(error.__cause__ or "").strip().splitlines()
    said = (getattr(error, "error_message", None) or "").strip().splitlines() or cause[-1:] or lines[:1]
    return f"{type(error).__name__} in {kernel[1] if kernel else 'a kernel'}: {said[0]}"


def driver_for(device: torch.device) -> Driver | None:
    """What captures on this device, or None where nothing does: a CPU, or an AMD GPU, whose graphs nobody has tried."""
    if device.type != "cuda" or torch.version.hip:
        return None
    from .cuda_driver import CudaDriver

    return CudaDriver(device)
