"""The one timer and the one way to sum up rounds, for the demo and for the benchmarks."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def fresh(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that may be written to: LeRobot decodes the state of an Aloha robot in place, at every call."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the rounds lie, linearly interpolated between neighbours.

    share   in [0, 1]      raises  ValueError without values
    """
    if not values:
        raise ValueError("no rounds were measured")
    return float(np.quantile(values, share))


def summary(rounds_ms: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99, lowest and highest of the raw rounds, in ms, and their count."""
    return {
        "p50_ms": percentile(rounds_ms, 0.50),
        "p95_ms": percentile(rounds_ms, 0.95),
        "p99_ms": percentile(rounds_ms, 0.99),
        "min_ms": min(rounds_ms),
        "max_ms": max(rounds_ms),
        "rounds": len(rounds_ms),
    }


def side_by_side(stock_ms: Sequence[float], own_ms: Sequence[float]) -> float:
    """The median over rounds of stock's time by the one taken beside it."""
    return percentile([stock / own for stock, own in zip(stock_ms, own_ms, strict=True)], 0.5)


def synchronize(device: torch.device | str) -> None:
    """Waits for the device's queue; a CPU has none. Of any kind of device that torch has a module for."""
    kind = torch.device(device).type
    wait = getattr(getattr(torch, kind, None), "synchronize", None)
    if kind == "mps" and wait is not None:
        wait()  # there is one of it
    elif kind != "cpu" and wait is not None:
        wait(device)


def timed_ms(function: Callable[[], Any], device: torch.device | str) -> tuple[float, Any]:
    """Wall time of one call in ms, until the device is done, and what the call returned."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3, result


def median_stages(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each stage over several ``stage_times``."""
    return {stage: statistics.median(round_[stage] for round_ in rounds) for stage in rounds[0]}


def error(value: Tensor, reference: Tensor) -> dict[str, float]:
    """``rel_l2`` and ``max_abs``, computed in fp64."""
    return {
        "rel_l2": rel_l2(value, reference),
        "max_abs": (value.double() - reference.double()).abs().max().item(),
    }


def rel_l2(x: Tensor, reference: Tensor) -> float:
    """``|x - reference| / |reference|``, in fp64."""
    x, reference = x.cpu().double(), reference.cpu().double()
    return float((x - reference).norm() / reference.norm())


class PeakMemory:
    """The highest memory use of this process since ``reset``: resident bytes, or device bytes on CUDA.

    Linux can forget a process's peak; where the system cannot, only a peak above the earlier ones is known,
    and else ``bytes`` is None.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._resets = False
        self.reset()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self._before = _peak_resident()
        try:
            # 5 is the kernel's code for "set the peak to what is resident now".
            Path("/proc/self/clear_refs").write_text("5")
            self._resets = True
        except OSError:
            self._resets = False

    @property
    def bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = _peak_resident()
        return peak if self._resets or peak > self._before else None


def _peak_resident() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def as_stock(policy: Any) -> Iterator[None]:
    """Inside, a patched policy is stock: same object, same weights; unlike unpatched, it keeps its engine."""
    patched = [(each, type(each)) for each in (policy.model, policy.model.vlm_with_expert)]
    for each, cls in patched:
        each.__class__ = getattr(cls, "stock_class", cls)
    try:
        yield
    finally:
        for each, cls in patched:
            each.__class__ = cls


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Runs with this many torch threads, and sets the former count again; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
