"""Checks every variant, then times those that passed, in turn, and records what was found: the one loop of all suites."""

from __future__ import annotations

import copy
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression

from benchmarks.harness.gate import CheckFailed, Unavailable, check_late
from benchmarks.harness.run import write_whole
from smolvla_fast.measure.rounds import percentile, summary

LEAST_ROUNDS = 3
LEAST_SECONDS = 30.0
"""Of a case: the first imports and compiles for all, and how many of those to come -k leaves is not known."""
ROOF = "roof"
"""A variant: the product by which the roof is measured, with ``best_ms`` of it."""
PREPARING = 0.6
"""Share of a case's time that preparations and checks may take."""


@dataclass
class Variant:
    """One row of a table: stock, a tier, a peer.

    check    makes it ready and compares it; returns facts, raises CheckFailed or Unavailable
    run      one round, until the device is done; it may return ms by stage
    foreign  another's code: what it raises is a reason to skip it
    policy   asked after the rounds whether stock ran in its place
    facts    what the result says beside its times
    """

    name: str
    check: Callable[[], dict[str, Any]]
    run: Callable[[], Any]
    foreign: bool = False
    policy: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    stats: Any = None
    dropped: str | None = None

    def round(self, benchmark: Any, group: str) -> None:
        start = time.perf_counter()
        stages = self.run()
        seconds = time.perf_counter() - start
        if self.stats is None:
            one = copy.copy(benchmark)
            one.name, one.group, one.extra_info = f"{benchmark.name}[{self.name}]", group, self.facts
            self.stats = one._make_stats(1)
        self.stats.update(seconds)
        if isinstance(stages, dict):
            self.facts.setdefault("stage_rounds_ms", []).append(stages)


class Measure:
    """What a suite measures with: its result, and its time, shared out among the cases that are still to come.

    facts  the machine's      red, skipped  what has no number, {name, reason}: wrong, or not to be had here
    left_out  what there was no time for      benchmark  pytest-benchmark's fixture in the test that runs
    """

    benchmark: Any

    def __init__(self, config: Any, path: Path | None, facts: dict[str, Any], seconds: float, choose: str):
        self.config, self.path, self.facts, self.choose = config, path, facts, choose
        self.end, self.cases = time.perf_counter() + seconds, 1
        self.red: list[dict[str, str]] = []
        self.skipped: list[dict[str, str]] = []
        self.left_out: list[str] = []
        self.interrupted = False

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def next_case(self, share: float | None) -> float:
        """Seconds of the case that begins now. share  of the time that is left; None: as much as any other case"""
        part = 1 / max(self.cases, 1) if share is None else share
        self.cases -= 1
        return min(max(part * self.left, LEAST_SECONDS), self.left)

    def leave_out(self, name: str, reason: str = "no time was left") -> None:
        self.left_out.append(f"{name}: {reason}")
        print(f"left out: {self.left_out[-1]}", flush=True)

    @contextmanager
    def attempt(self, variant: Variant, where: str) -> Iterator[None]:
        """Inside something is done for a variant; what is wrong with it costs its own numbers and no other's."""
        name = f"{variant.name}, {where}"
        try:
            yield
        except Exception as error:
            reason, wrong = str(error), isinstance(error, CheckFailed)
            if not isinstance(error, (TimeoutError, Unavailable, CheckFailed)):
                print(traceback.format_exc(), flush=True)
                first = (reason.strip() or "no message").splitlines()[0][:300]
                # Another's compiler: whatever it raises is the reason.
                reason, wrong = f"{type(error).__name__}: {first}", not variant.foreign
            variant.dropped = reason
            if variant.stats is not None:
                variant.stats.fixture.has_error = True  # pytest-benchmark then writes no number
            if isinstance(error, TimeoutError):
                self.leave_out(name, reason)
                return
            (self.red if wrong else self.skipped).append(dict(variant=variant.name, name=name, reason=reason))
            print(f"{'red, so it is not timed' if wrong else 'skipped'}: {name}: {reason}", flush=True)

    def chosen(self, name: str) -> bool:
        """Whether -k names this variant; a benchmark's name is that of the test and of the variant."""
        whole = f"{self.benchmark.fullname}[{name}]".lower()
        wanted = Expression.compile(self.choose) if self.choose else None
        return wanted is None or wanted.evaluate(lambda word, **_: word.lower() in whole)

    def __call__(
        self, group: str, variants: list[Variant], rounds: int, share: float | None = None,
        then: Callable[[list[Variant]], None] = list, **facts: Any,
    ) -> list[Variant]:  # fmt: skip
        """Measures the variants; the first is what ratios are to. Returns those that have numbers.

        share  of the time that is left to the suite (None: as much as any other case)
        then   called with those that passed their checks, before any is timed; it may drop some
        facts  of the case, the same for all
        """
        variants = [each for each in variants if self.chosen(each.name)]
        begun, seconds = time.perf_counter(), self.next_case(share)
        if not variants:
            pytest.skip("no variant is chosen by -k")
        if self.left <= 0:
            self.leave_out(group)
            pytest.skip("no time was left")
        self.benchmark._mode = "rounds in turn"  # or pytest-benchmark warns that its fixture was not used
        print(f"\n{group}: {len(variants)} variants, at most {seconds:.0f} s", flush=True)
        for each in variants:
            with self.attempt(each, group), limited(begun + PREPARING * seconds - time.perf_counter()):
                each.facts.update({**facts, **each.check()})
        then([each for each in variants if not each.dropped])
        self._rounds(group, variants, rounds, begun + seconds)
        for each in variants:
            with self.attempt(each, group):
                if not each.dropped and each.policy is not None:
                    check_late(each.policy)
        self.save()
        ready = [each for each in variants if not each.dropped]
        for each in ready:
            data = each.stats.stats.data
            print(f"{each.name}: p50 {1e3 * percentile(data, 0.5):.3f} ms, {len(data)} rounds", flush=True)
        return ready

    def _rounds(self, group: str, variants: list[Variant], rounds: int, end: float) -> None:
        """In turn; each round begins with another, so that nobody always follows the same neighbour."""
        for index in range(rounds):
            ready = [each for each in variants if not each.dropped]
            # However little time is left, the medians are of LEAST_ROUNDS, unless the whole suite's is over.
            over = time.perf_counter() > (end if index >= LEAST_ROUNDS else self.end)
            if not ready or (index and over):
                break
            place = index % len(ready)
            for each in ready[place:] + ready[:place]:
                with self.attempt(each, group):
                    each.round(self.benchmark, group)

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


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in this block after so many seconds: at once in Python, in a compiled call when it returns."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"its preparation took more than {seconds:.0f} s")

    if seconds <= 0:
        raise TimeoutError("no time was left")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def derive(benchmarks: Sequence[dict[str, Any]]) -> None:
    """Adds to ``extra_info`` what follows from raw rounds: percentiles, the share of the roof, the ratio to ``ratio_to``."""
    taken: dict[tuple[str, str], list[float]] = {}
    roofs: dict[str, tuple[float, list[float]]] = {}
    for bench in sorted(benchmarks, key=lambda each: each["extra_info"]["variant"] != ROOF):
        info = bench["extra_info"]
        ms = [1e3 * seconds / info.get("calls_a_round", 1) for seconds in bench["stats"]["data"]]
        taken[bench["group"], info["variant"]] = ms
        if info["variant"] == ROOF:
            roofs[bench["group"]] = info["best_ms"], ms
        info.update(summary(ms))
        if base := taken.get((bench["group"], info["ratio_to"])):
            info["ratio"] = percentile([a / b for a, b in zip(base, ms, strict=False)], 0.5)
        best = info.get("device_ms", info)["p50_ms"]
        if "floor_ms" in info:
            info["share_of_floor"] = info["floor_ms"] / best
        if "floor_ms" in info and (in_turn := roofs.get(bench["group"])):
            best_ms, rounds_ms = in_turn
            shares = [info["floor_ms"] * now / best_ms / own for now, own in zip(rounds_ms, ms, strict=False)]
            info["share_in_turn"] = percentile(shares, 0.5)
        if "flops" in info:
            info.update(gflops_per_s=info["flops"] / best / 1e6, gbytes_per_s=info["bytes"] / best / 1e6)
        rounds = info.get("stage_rounds_ms")
        for stage in rounds[0] if rounds else ():
            floor = info.get("stage_floors", {}).get(stage, {})
            figures = {**summary([each[stage] for each in rounds]), **floor}
            if floor:
                figures["share_of_floor"] = figures["floor_ms"] / figures["p50_ms"]
            info.setdefault("stages", {})[stage] = figures
