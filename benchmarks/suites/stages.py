"""Stages of a chunk: vision, prefix, denoise, each beside the least time it could take here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

import smolvla_fast
from benchmarks.harness.flags import counts
from benchmarks.harness.measure import Variant
from benchmarks.harness.plugin import rounds
from benchmarks.harness.setup import BenchmarkSetup, Case
from smolvla_fast import inference
from smolvla_fast.engine.timing import STAGES, stage_times

CAMERAS = 2
LOOPS = {"cuda": ("triton", "cuda"), "cpu": ("torch", "cpu")}
"""Backends whose denoise loops stand beside each other. On a GPU: op by op, and all steps in one launch."""


def mark() -> Any:
    # A graph records an event anew at each replay only if it is an external one.
    event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
    event.record()
    return event


def times_inside(chunk: Callable[[], Any], marks: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """ms by stage, and "total" from the first mark to the last, of a chunk that is waited for.

    marks  two events around each stage, put there when it runs; captured with it, they time every replay from inside
    """

    @contextmanager
    def section(name: str) -> Iterator[None]:
        start = mark()
        yield
        # The capture comes after its warm-up and replaces its marks.
        marks[name] = (start, mark())

    with patch.object(inference, "section", section):
        chunk()
    missing = ", ".join(stage for stage in STAGES if stage not in marks)
    assert not missing, f"no marks around {missing}: the engine does not call timing.section there"
    spans = {stage: marks[stage] for stage in STAGES}
    spans["total"] = (marks[STAGES[0]][0], marks[STAGES[-1]][1])
    return {name: start.elapsed_time(stop) for name, (start, stop) in spans.items()}


def by_stage(variant: Variant, setup: BenchmarkSetup, case: Case) -> Variant:
    """Stages are synchronized between each other; of a patched variant on a GPU timed inside its captured chunk."""
    variant.run = lambda: stage_times(variant.policy, *setup.inputs(case.cameras, case.batch))
    if variant.facts["kind"] == "tier" and setup.device.type == "cuda":
        check, marks = variant.check, {}
        run = variant.run = lambda: times_inside(lambda: setup.chunk(variant.policy, case), marks)

        def checked() -> dict[str, Any]:
            facts = check()
            smolvla_fast.refresh(variant.policy)  # graphs are captured anew, with marks
            run()
            return {**facts, "status": smolvla_fast.status(variant.policy).to_dict()}

        variant.check = checked
    return variant


def test_stages(measure: Any, make_setup: Any, pytestconfig: Any) -> None:
    setup, case = make_setup(), Case(CAMERAS)
    variants = [by_stage(each, setup, case) for each in setup.variants(case)]
    for name in ("fp32", "bf16"):  # whoever calls layers and steps one by one
        each = setup.tier(name, case, label=f"{name}, LeRobot's sampler")
        each.run = partial(stage_times, each.policy, *setup.inputs(CAMERAS), stock_sampler=True)
        variants.append(each)
    measure(setup.named("stages", case), variants, rounds(pytestconfig), suite="stages")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", counts(metafunc.config.getoption("--batch"), "--batch", (1, 8)))


def test_denoise(measure: Any, make_setup: Any, pytestconfig: Any, device: torch.device, batch: int) -> None:
    """The denoise stage of tier bf16 by backend, in turn: ``auto`` takes Triton; whether it should is measured here."""
    if device.type == "cpu" and pytestconfig.getoption("--size") == "full":
        pytest.skip("on a CPU one backend has a loop of its own")
    setup, case = make_setup(), Case(CAMERAS, batch)
    variants = []
    for name in LOOPS[device.type]:
        variants.append(by_stage(setup.tier("bf16", case, name, f"bf16, {name}"), setup, case))
        variants[-1].facts.update(ratio_to=variants[0].name, loop_backend=name)
    measure(setup.named("stages", case) + ", by backend", variants, rounds(pytestconfig), suite="stages")
