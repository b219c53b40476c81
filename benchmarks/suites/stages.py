"""Where a chunk's time goes: vision, prefix and denoise, each beside the least time it could take here."""

from __future__ import annotations

from typing import Any

import pytest

import smolvla_fast
from benchmarks.harness.device_timing import StageMarks
from benchmarks.harness.flags import counts
from benchmarks.harness.measure import Variant
from benchmarks.harness.plugin import device_of, rounds
from benchmarks.harness.setup import BenchmarkSetup, Case
from smolvla_fast.model.precision import TIERS

CAMERAS = 2
LOOPS = {"cuda": ("triton", "cuda"), "cpu": ("torch", "cpu")}
"""Backends whose denoise loops stand beside each other. On a GPU: op by op, and all steps in one launch."""


def by_marks(variant: Variant, setup: BenchmarkSetup, case: Case) -> Variant:
    """A patched variant, timed inside its captured chunk."""
    marks, check = StageMarks(setup.device), variant.check

    def checked() -> dict[str, Any]:
        facts = check()
        smolvla_fast.refresh(variant.policy)  # graphs are captured anew, with marks
        run()
        return {**facts, "where": "inside the captured chunk", "status": setup.status_of(variant.policy)}

    def run() -> dict[str, float]:
        with marks.placed():
            setup.chunk(variant.policy, case)
        return marks.read()

    variant.check, variant.run = checked, run
    return variant


def timed_by_stage(variants: list[Variant], setup: BenchmarkSetup, case: Case, ceilings: Any) -> None:
    for each in variants:
        if each.facts["kind"] == "tier":
            by_marks(each, setup, case)
        else:
            each.run = lambda policy=each.policy: setup.stage_times(policy, case)
            each.facts["where"] = "synchronized between stages"
        each.facts["stage_floors"] = setup.floors(each.facts["precision"], case, ceilings)


def test_stages(measure: Any, make_setup: Any, ceilings: Any, pytestconfig: Any) -> None:
    setup, case = make_setup(), Case(CAMERAS)
    variants = [setup.stock(case), *(setup.tier(name, case) for name in TIERS)]
    timed_by_stage(variants, setup, case, ceilings)
    group = f"stages: {setup.group}, {CAMERAS} cameras"
    measure(group, variants, rounds(pytestconfig), suite="stages")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", counts(metafunc.config.getoption("--batch"), "--batch", (1, 8)))


def test_denoise(measure: Any, make_setup: Any, ceilings: Any, pytestconfig: Any, batch: int) -> None:
    """The denoise stage of tier bf16 by backend, in turn: ``auto`` takes Triton; whether it should is measured here."""
    if device_of(pytestconfig).type == "cpu" and pytestconfig.getoption("--size") == "full":
        pytest.skip("on a CPU one backend has a loop of its own")
    setup, case = make_setup(), Case(CAMERAS, batch)
    labels = {f"bf16, {backend}": backend for backend in LOOPS[setup.device.type]}
    variants = [setup.tier("bf16", case, backend, label) for label, backend in labels.items()]
    timed_by_stage(variants, setup, case, ceilings)
    for each in variants:
        each.facts.update(ratio_to=variants[0].name, loop_backend=labels[each.name])
    group = (
        f"stages: {setup.group}, {CAMERAS} cameras"
        + (f", batch {batch}" if batch > 1 else "")
        + ", by backend"
    )
    measure(group, variants, rounds(pytestconfig), suite="stages")
