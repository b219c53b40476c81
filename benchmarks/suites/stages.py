"""Where a chunk's time goes: vision, prefix and denoise, each beside the least time it could take here."""

from __future__ import annotations

import pytest

from benchmarks.harness.account import stage_costs
from benchmarks.harness.gate import check_chunk, timed
from benchmarks.harness.plugin import rounds
from benchmarks.harness.setup import why_not
from smolvla_fast.engine.timing import stage_times
from smolvla_fast.measure.rounds import summary
from smolvla_fast.model.precision import TIERS

CAMERAS = 2


@pytest.mark.parametrize("variant", ["stock", *TIERS])
def test_stages(benchmark, subject, patched, ceilings, pytestconfig, variant):
    if why_not(variant, subject.device):
        pytest.skip(str(why_not(variant, subject.device)))
    benchmark.group = f"stages: {subject.group}, {CAMERAS} cameras"
    batch = subject.observation(CAMERAS)
    found: list[dict[str, float]] = []

    def check():
        if variant == "stock":
            return check_chunk(subject.stock_chunk(CAMERAS), subject.stock_chunk(CAMERAS), 0.0)
        return subject.check(variant, CAMERAS)

    if variant in TIERS:
        patched(variant)
    timed(
        benchmark,
        check,
        lambda: found.append(stage_times(subject.policy, batch, subject.noise())),
        rounds(pytestconfig),
    )
    measured = found[1:]  # without the warm-up
    dtype = subject.compute_dtype(variant)
    language = batch["observation.language.tokens"].shape[1]
    stages = {stage: summary([times[stage] for times in measured]) for stage in measured[0]}
    for stage, cost in stage_costs(subject.policy.model, CAMERAS, language, dtype.itemsize).items():
        floor_ms = ceilings.floor_ms(cost.flops, cost.bytes, dtype)
        stages[stage].update(
            flops=cost.flops,
            bytes=cost.bytes,
            floor_ms=floor_ms,
            share_of_floor=floor_ms / stages[stage]["p50_ms"],
        )
    benchmark.extra_info.update(
        suite="stages", variant=variant, cameras=CAMERAS, steps=subject.policy.config.num_steps,
        layout=subject.layout, stages=stages,
    )  # fmt: skip
