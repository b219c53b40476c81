"""Checks every variant, then times those that passed, in turn: the one loop of all suites."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from _pytest.mark.expression import Expression

from benchmarks.harness.gate import CheckFailed
from benchmarks.harness.recorder import Recorder

LEAST_ROUNDS = 3
PREPARING = 0.6
"""Share of a case's time that preparations and checks may take."""


@dataclass
class Variant:
    """One row of a table: stock, a tier, a peer.

    check    makes it ready and compares it; returns facts, raises CheckFailed or Unavailable
    run      one round, until the device is done; it may return ms by stage
    late     asked after the rounds: what is wrong, or None
    foreign  another's code: what it raises is a reason to skip it
    facts    what the result says beside its times
    """

    name: str
    check: Callable[[], dict[str, Any]]
    run: Callable[[], Any]
    late: Callable[[], str | None] = lambda: None
    foreign: bool = False
    policy: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    stats: Any = None
    dropped: str | None = None

    def drop(self, reason: str) -> None:
        self.dropped = reason
        if self.stats is not None:
            self.stats.fixture.has_error = True  # pytest-benchmark then writes no number

    def record(self, benchmark: Any, group: str, seconds: float) -> None:
        if self.stats is None:
            one = copy.copy(benchmark)
            one.name, one.group, one.extra_info = f"{benchmark.name}[{self.name}]", group, self.facts
            self.stats = one._make_stats(1)
        self.stats.update(seconds)


class Clock:
    """The time of a suite, shared out among the cases that are still to come."""

    def __init__(self, seconds: float) -> None:
        self.end, self.cases = time.perf_counter() + seconds, 1

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def next_case(self, share: float | None) -> float:
        """When the case that begins now is to end. share  of the time that is left; None: as much as any other case."""
        now, part = time.perf_counter(), 1 / max(self.cases, 1) if share is None else share
        self.cases -= 1
        return now + part * self.left


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in this block after so many seconds: at once in Python, in a compiled call when it returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"its preparation took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Measure:
    """The fixture of a suite's test."""

    benchmark: Any
    recorder: Recorder
    clock: Clock
    choose: str | None

    def chosen(self, name: str) -> bool:
        """Whether -k names this variant; a benchmark's name is that of the test and of the variant."""
        whole = f"{self.benchmark.fullname}[{name}]".lower()
        return not self.choose or Expression.compile(self.choose).evaluate(
            lambda word, **_: word.lower() in whole
        )

    def __call__(
        self, group: str, variants: list[Variant], rounds: int, share: float | None = None,
        then: Callable[[list[Variant]], None] | None = None, **facts: Any,
    ) -> list[Variant]:  # fmt: skip
        """Measures the variants; the first is what ratios are to. Returns those that have numbers.

        share  of the time that is left to the suite (None: as much as any other case)
        then   called with those that passed their checks, before any is timed; it may drop some
        facts  of the case, the same for all
        """
        variants = [each for each in variants if self.chosen(each.name)]
        end = self.clock.next_case(share)
        if not variants:
            pytest.skip("no variant is chosen by -k")
        if self.clock.left <= 0:
            self.recorder.leave_out(group)
            pytest.skip("no time was left")
        self.benchmark._mode = "rounds in turn"  # or pytest-benchmark warns that its fixture was not used
        begun = time.perf_counter()
        prepared = begun + PREPARING * (end - begun)
        print(f"\n{group}: {len(variants)} variants, at most {end - begun:.0f} s", flush=True)
        for each in variants:
            if time.perf_counter() > prepared:
                self.recorder.leave_out(f"{each.name}, {group}")
                each.drop("no time was left")
                continue
            with self.recorder.attempt(each, group), limited(prepared - time.perf_counter()):
                each.facts.update(facts)
                each.facts.update(each.check())
        ready = [each for each in variants if not each.dropped]
        if then is not None:
            then(ready)
        self._rounds(group, [each for each in ready if not each.dropped], rounds, end)
        for each in ready:
            with self.recorder.attempt(each, group):
                reason = None if each.dropped else each.late()
                if reason:
                    raise CheckFailed(reason)
        self.recorder.save()
        ready = [each for each in ready if not each.dropped]
        for each in ready:
            data = sorted(each.stats.stats.data)
            print(f"{each.name}: p50 {1e3 * data[len(data) // 2]:.3f} ms, {len(data)} rounds", flush=True)
        return ready

    def _rounds(self, group: str, ready: list[Variant], rounds: int, end: float) -> None:
        """In turn; each round begins with another, so that nobody always follows the same neighbour."""
        for index in range(rounds):
            now = time.perf_counter()
            # However little time is left, the medians are of LEAST_ROUNDS, unless the whole suite's is over.
            if ready and index and now > (end if index >= LEAST_ROUNDS else self.clock.end):
                break
            place = index % max(len(ready), 1)
            for each in ready[place:] + ready[:place]:
                with self.recorder.attempt(each, group):
                    start = time.perf_counter()
                    stages = each.run()
                    seconds = time.perf_counter() - start
                    each.record(self.benchmark, group, seconds)
                    if isinstance(stages, dict):
                        each.facts.setdefault("stage_rounds_ms", []).append(stages)
            ready = [each for each in ready if not each.dropped]
