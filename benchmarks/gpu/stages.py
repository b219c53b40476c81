"""Part ``stages``: vision, prefix and denoise inside the captured chunk, each beside the least time it could take here."""

from __future__ import annotations

from typing import Any

import smolvla_fast
from benchmarks.account import stage_costs
from benchmarks.gate import check_chunk, timed
from benchmarks.gpu.chunk import HEADLINE, make_subject
from benchmarks.gpu.record import Recorder, Run
from benchmarks.gpu.timing import StageMarks, stage_marks
from benchmarks.subject import Subject, why_not
from smolvla_fast.cli.measure import summary
from smolvla_fast.precision import TIERS
from smolvla_fast.timing import stage_times

ROUNDS, SECONDS = 200, 3.0


def stages(run: Run) -> None:
    cameras, _, layers = HEADLINE
    subject = make_subject(run, None if run.rehearse else layers)
    for variant in ("stock", *TIERS):
        _one(run, subject, variant, cameras)


def _one(run: Run, subject: Subject, variant: str, cameras: int) -> None:
    reason = why_not(variant, run.device)
    if reason:
        run.leave_out(f"{variant}, by stage", reason)
        return
    found: list[dict[str, float]] = []
    batch, noise = subject.observation(cameras), subject.noise()
    rounds = 3 if run.rehearse else ROUNDS

    def stock(recorder: Recorder) -> None:
        def check() -> dict[str, Any]:
            return check_chunk(subject.chunk(cameras), subject.stock_chunk(cameras), 0.0)

        timed(recorder, check, lambda: found.append(stage_times(subject.policy, batch, noise)), rounds)
        describe(recorder)

    def tier(recorder: Recorder) -> None:
        smolvla_fast.patch(subject.policy, precision=variant)
        marks: StageMarks

        def one() -> None:
            subject.chunk(cameras)
            found.append(marks.read())

        with stage_marks(subject.policy, run.device) as marks:
            timed(recorder, lambda: subject.check(variant, cameras), one, rounds)
        describe(recorder)

    def describe(recorder: Recorder) -> None:
        measured = found[1:]  # without the warm-up
        dtype = subject.compute_dtype(variant)
        language = batch["observation.language.tokens"].shape[1]
        figures = {stage: summary([times[stage] for times in measured]) for stage in measured[0]}
        costs = stage_costs(subject.policy.model, cameras, language, dtype.itemsize)
        for stage, cost in costs.items():
            floor_ms = run.ceilings.floor_ms(cost.flops, cost.bytes, dtype)
            share = floor_ms / figures[stage]["p50_ms"]
            figures[stage].update(flops=cost.flops, bytes=cost.bytes, floor_ms=floor_ms, share_of_floor=share)
        where = "synchronized between stages" if variant == "stock" else "inside the captured chunk"
        recorder.extra_info.update(
            suite="stages", variant=variant, cameras=cameras, steps=subject.policy.config.num_steps,
            layout=subject.layout, where=where, stages=figures, stage_rounds_ms=measured,
        )  # fmt: skip

    group = f"stages: {subject.group}, {cameras} cameras"
    try:
        measure = stock if variant == "stock" else tier
        run.bench(f"{variant}, {cameras} cameras, by stage", group, SECONDS, measure)
    finally:
        smolvla_fast.unpatch(subject.policy)
