"""What has been measured so far, in pytest-benchmark's form; written after every case and when a run is interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.gate import CheckFailed, Unavailable
from smolvla_fast.measure.rounds import side_by_side, summary


class Recorder:
    """The result of one suite.

    facts  the machine's      red, skipped  what has no number, {name, reason}: wrong, or not to be had here
    left_out  what there was no time for
    """

    def __init__(self, config: Any, path: Path | None, facts: dict[str, Any]) -> None:
        self.config, self.path, self.facts = config, path, facts
        self.red: list[dict[str, str]] = []
        self.skipped: list[dict[str, str]] = []
        self.left_out: list[str] = []
        self.interrupted = False

    def leave_out(self, name: str, reason: str = "no time was left") -> None:
        self.left_out.append(f"{name}: {reason}")
        print(f"left out: {self.left_out[-1]}", flush=True)

    @contextmanager
    def attempt(self, variant: Any, where: str) -> Iterator[None]:
        """Inside something is done for a variant; what is wrong with it costs its own numbers and no other's."""
        name = f"{variant.name}, {where}"
        try:
            yield
        except Exception as error:
            reason, wrong = str(error), isinstance(error, CheckFailed)
            if not isinstance(error, (TimeoutError, Unavailable, CheckFailed)):
                first = (reason.strip() or "no message").splitlines()[0][:300]
                # Another's compiler: whatever it raises is the reason.
                reason, wrong = f"{type(error).__name__}: {first}", not variant.foreign
            variant.drop(reason)
            if isinstance(error, TimeoutError):
                self.leave_out(name, reason)
                return
            (self.red if wrong else self.skipped).append(dict(variant=variant.name, name=name, reason=reason))
            print(f"{'red, so it is not timed' if wrong else 'skipped'}: {name}: {reason}", flush=True)

    def data(self) -> dict[str, Any]:
        found = self.config.hook.pytest_benchmark_generate_json(
            config=self.config, benchmarks=self.config._benchmarksession.benchmarks, include_data=True,
            machine_info={"smolvla_fast": self.facts}, commit_info={},
        )  # fmt: skip
        derive(found["benchmarks"])
        lists = {"red": self.red, "skipped": self.skipped, "left_out": self.left_out}
        return {**found, **lists, "interrupted": self.interrupted}

    def save(self) -> None:
        if self.path is not None:
            write_whole(self.path, self.data())


def write_whole(path: Path, data: Any) -> None:
    """JSON that is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1, default=str) + "\n")
    part.replace(path)


def derive(benchmarks: Sequence[dict[str, Any]]) -> None:
    """Adds to ``extra_info`` what follows from raw rounds: percentiles, the share of the roof, and the ratio to the variant
    ``ratio_to`` of the group, the median over rounds of its time by the one taken beside it."""
    taken: dict[tuple[str, str], list[float]] = {}
    for bench in benchmarks:
        info = bench["extra_info"]
        ms = [1e3 * seconds / info.get("calls_a_round", 1) for seconds in bench["stats"]["data"]]
        taken[bench["group"], info["variant"]] = ms
        info.update(summary(ms))
        base = taken.get((bench["group"], info["ratio_to"]))
        if base:
            beside = min(len(base), len(ms))
            info["ratio"] = side_by_side(base[:beside], ms[:beside])
        best = info.get("device_ms", info)["p50_ms"]
        if "floor_ms" in info:
            info["share_of_floor"] = info["floor_ms"] / best
        if "flops" in info:
            info.update(gflops_per_s=info["flops"] / best / 1e6, gbytes_per_s=info["bytes"] / best / 1e6)
        rounds = info.get("stage_rounds_ms")
        for stage in rounds[0] if rounds else ():
            floor = info.get("stage_floors", {}).get(stage, {})
            figures = {**summary([each[stage] for each in rounds]), **floor}
            if floor:
                figures["share_of_floor"] = figures["floor_ms"] / figures["p50_ms"]
            info.setdefault("stages", {})[stage] = figures
