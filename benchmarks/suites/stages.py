"""Stages of a chunk: vision, prefix, denoise, each beside the least time it could take here."""

from __future__ import annotations

from typing import Any

import pytest

import smolvla_fast
from benchmarks.harness.device_timing import StageMarks
from benchmarks.harness.flags import counts
from benchmarks.harness.measure import Variant
from benchmarks.harness.plugin import device_of, rounds
from benchmarks.harness.setup import BenchmarkSetup, Case
from smolvla_fast.engine.timing import stage_times

CAMERAS = 2
LOOPS = {"cuda": ("triton", "cuda"), "cpu": ("torch", "cpu")}
"""Backends whose denoise loops stand beside each other. On a GPU: op by op, and all steps in one launch."""


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
