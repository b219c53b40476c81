"""What a part has found so far: benches in pytest-benchmark's form, and what was red. Written after every bench."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.harness.machine import Ceilings, measure_ceilings


class Recorder:
    """Stands for pytest-benchmark's fixture: rounds until there are enough of them or their time is over."""

    def __init__(self, name: str, group: str, seconds: float) -> None:
        self.name, self.group = name, group
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
        self._seconds = seconds

    def pedantic(self, run: Callable[[], Any], rounds: int, warmup_rounds: int, iterations: int) -> None:
        """At least one round, at most ``rounds``, and none that begins after ``seconds``."""
        assert iterations == 1
        for _ in range(warmup_rounds):
            run()
        data = self.stats.stats.data
        end = time.perf_counter() + self._seconds
        while len(data) < rounds and (not data or time.perf_counter() < end):
            start = time.perf_counter()
            run()
            data.append(time.perf_counter() - start)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "group": self.group,
            "extra_info": self.extra_info,
            "stats": {"data": self.stats.stats.data},
        }


@dataclass
class Run:
    """One part under way.

    seconds   until what has not begun is left out      only  the one op that is asked for
    benches   done      red, left_out  what is not, with the reason
    """

    part: str
    folder: Path
    seconds: float
    rehearse: bool
    only: str | None = None
    benches: list[dict[str, Any]] = field(default_factory=list)
    red: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.end = time.perf_counter() + self.seconds
        self.device = torch.device("cpu" if self.rehearse else "cuda")
        self._ceilings: Ceilings | None = None

    @property
    def ceilings(self) -> Ceilings:
        """Measured by the first part that asks, and read by the others of the same run."""
        if self._ceilings is None:
            path = self.folder / "ceilings.json"
            if path.is_file():
                found = json.loads(path.read_text())
                flops = {getattr(torch, name): rate for name, rate in found["gemm_flops"].items()}
                self._ceilings = Ceilings(flops, found["copy_bytes"])
            else:
                self._ceilings = measure_ceilings(self.device, small=self.rehearse)
                path.write_text(json.dumps(self._ceilings.to_dict()))
        return self._ceilings

    def bench(self, name: str, group: str, seconds: float, measure: Callable[[Recorder], None]) -> None:
        """Measure one thing. Red: it is noted with its reason and leaves no number. Late: it is left out by name."""
        if time.perf_counter() > self.end:
            self.leave_out(name, "no time was left")
            return
        recorder = Recorder(name, group, seconds)
        try:
            measure(recorder)
        except (Exception, pytest.fail.Exception) as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            kind = "" if isinstance(error, pytest.fail.Exception) else f"{type(error).__name__}: "
            self.red.append({"name": name, "reason": kind + reason})
            print(f"red: {name}: {kind}{reason}", flush=True)
        else:
            self.benches.append(recorder.to_dict())
            print(f"{name}: p50 {recorder.extra_info.get('p50_ms', float('nan')):.3f} ms", flush=True)
        self.save()

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.append(f"{name}: {reason}")
        print(f"left out: {name}: {reason}", flush=True)
        self.save()

    def save(self) -> None:
        found = {"benchmarks": self.benches, "red": self.red, "left_out": self.left_out}
        path = self.folder / f"{self.part}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(path)
