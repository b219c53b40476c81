"""Stages of a chunk: vision, prefix, denoise, each beside the least time it could take here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

import smolvla_fast
from benchmarks.harness.flags import counts
from benchmarks.harness.measure import Variant
from benchmarks.harness.plugin import device_of, rounds
from benchmarks.harness.setup import BenchmarkSetup, Case
from smolvla_fast import inference
from smolvla_fast.engine.timing import STAGES, stage_times

CAMERAS = 2
LOOPS = {"cuda": ("triton", "cuda"), "cpu": ("torch", "cpu")}
"""Backends whose denoise loops stand beside each other. On a GPU: op by op, and all steps in one launch."""


class StageMarks:
    """Two events around each stage of a chunk; captured with it, they time every replay from inside the graph.

    On a CPU they are points of wall time, taken anew in every chunk.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: dict[str, tuple[Any, Any]] = {}

    def placed(self) -> Any:
        """Inside, chunks carry these marks, and so do the graphs that are captured there."""
        return patch.object(inference, "section", self._section)

    @contextmanager
    def _section(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        # The capture comes after its warm-up and replaces its marks.
        self._marks[name] = (start, self._mark())

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        # A graph records an event anew at each replay only if it is an external one.
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """ms by stage, and "total" from the first mark to the last, of the chunk that has just been waited for."""
        missing = ", ".join(stage for stage in STAGES if stage not in self._marks)
        assert not missing, f"no marks around {missing}: the engine does not call timing.section there"
        spans = {stage: self._marks[stage] for stage in STAGES}
        spans["total"] = (spans[STAGES[0]][0], spans[STAGES[-1]][1])
        ms = lambda start, stop: start.elapsed_time(stop) if self._cuda else 1e3 * (stop - start)  # noqa: E731
        return {name: ms(*span) for name, span in spans.items()}


def by_stage(variant: Variant, setup: BenchmarkSetup, case: Case) -> Variant:
    """Stock is synchronized between its stages; a patched variant is timed inside its captured chunk."""
    if variant.facts["kind"] != "tier":
        variant.run = lambda: stage_times(variant.policy, *setup.inputs(case.cameras, case.batch))
        return variant
    marks, check = StageMarks(setup.device), variant.check

    def checked() -> dict[str, Any]:
        facts = check()
        smolvla_fast.refresh(variant.policy)  # graphs are captured anew, with marks
        run()
        return {**facts, "status": setup.status_of(variant.policy)}

    def run() -> dict[str, float]:
        with marks.placed():
            setup.chunk(variant.policy, case)
        return marks.read()

    variant.check, variant.run = checked, run
    return variant


def test_stages(measure: Any, make_setup: Any, pytestconfig: Any) -> None:
    setup, case = make_setup(), Case(CAMERAS)
    variants = [by_stage(each, setup, case) for each in setup.variants(case)]
    measure(setup.named("stages", case), variants, rounds(pytestconfig), suite="stages")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", counts(metafunc.config.getoption("--batch"), "--batch", (1, 8)))


def test_denoise(measure: Any, make_setup: Any, pytestconfig: Any, batch: int) -> None:
    """The denoise stage of tier bf16 by backend, in turn: ``auto`` takes Triton; whether it should is measured here."""
    if device_of(pytestconfig).type == "cpu" and pytestconfig.getoption("--size") == "full":
        pytest.skip("on a CPU one backend has a loop of its own")
    setup, case = make_setup(), Case(CAMERAS, batch)
    first, second = LOOPS[setup.device.type]
    variants = [setup.tier("bf16", case, name, f"bf16, {name}") for name in (first, second)]
    for each, name in zip(variants, (first, second), strict=True):
        by_stage(each, setup, case).facts.update(ratio_to=f"bf16, {first}", loop_backend=name)
    measure(setup.named("stages", case) + ", by backend", variants, rounds(pytestconfig), suite="stages")
