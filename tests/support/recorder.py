"""A graph driver without a GPU: records the ATen calls of a chunk and runs them again on the very same tensors.

Like a CUDA graph it knows addresses, not names: a replay reads inputs and weights where they lay when it was recorded,
sees what is written into them, and does not see a parameter that was put in their place. And like a capture it refuses
what waits for the device or brings in a host constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smolvla_fast.engine.side_stream import Side, offered

aten = torch.ops.aten
FORBIDDEN = {
    aten._local_scalar_dense.default: "waits for the device (.item(), bool(), int())",
    aten.lift_fresh.default: "brings in a host constant (torch.tensor(...))",
    aten.nonzero.default: "makes a tensor whose shape depends on data",
}


class Illegal(RuntimeError):
    """What a CUDA capture would refuse."""


_under_way: list[_Recorder] = []


class _Recorder(TorchDispatchMode):
    def __init__(self, fail_at: int | None) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._fail_at = fail_at

    def __enter__(self) -> _Recorder:
        _under_way.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _under_way.pop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An empty constant moves no byte: transformers' caches begin with one.
        if func in FORBIDDEN and not (func is aten.lift_fresh.default and not args[0].numel()):
            raise Illegal(f"{func} {FORBIDDEN[func]}")
        if len(self.calls) == self._fail_at:
            raise torch.OutOfMemoryError("out of memory while recording")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class RecordedLibrary:
    """A library of kernels on raw addresses, whose calls are recorded as well: a replay finds the same addresses again."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        return recorded(function)


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of which a recording under way notes every call: a launch that ATen does not see."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if _under_way:
            _under_way[-1].calls.append((function, args, kwargs, None))
        return function(*args, **kwargs)

    return call


@dataclass
class Recording:
    calls: list[tuple[Any, Any, Any, Any]]
    bytes: int = 1000
    nodes: int = 0


class RecorderDriver:
    """``graphs.Driver`` on the CPU. Counts what it is asked; fails where it is told to.

    fail_at  "warmup", or the number of the recorded call at which memory runs out
    side     what a capture and its warm-up may queue work on beside the rest; here all is one order
    """

    def __init__(self, fail_at: str | int | None = None, side: Side | None = None) -> None:
        self.fail_at, self.side = fail_at, side
        self.captures = self.replays = self.releases = 0
        self.capturing = False

    def busy(self) -> bool:
        return self.capturing

    def capture(self, run: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        if self.fail_at == "warmup":
            raise torch.OutOfMemoryError("out of memory while warming up")
        with offered(self.side):
            run()
            self.captures += 1
            with _Recorder(self.fail_at if isinstance(self.fail_at, int) else None) as recorder:
                output = run()
        # What recording computed must not be mistaken for what a replay computes.
        output.fill_(torch.nan)
        return Recording(recorder.calls, nodes=len(recorder.calls)), output

    def replay(self, recording: Recording) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in recording.calls:
            out = func(*args, **kwargs)
            if not isinstance(func, torch._ops.OpOverload):
                continue
            if any(each.alias_info is not None for each in func._schema.returns):
                continue  # a view or an in-place call: the recorded result is the same memory
            pairs = zip(_tensors(recorded), _tensors(out), strict=True)
            for old, new in pairs:
                old.copy_(new)

    def wait(self, mark: Any) -> None:
        assert mark == "done"

    def mark(self) -> Any:
        return "done"

    def collect(self) -> None:
        pass

    def release(self) -> None:
        self.releases += 1


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for item in value for each in _tensors(item)] if isinstance(value, list | tuple) else []
