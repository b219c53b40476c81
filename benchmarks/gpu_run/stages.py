"""Part ``stages``: vision, prefix and denoise inside the captured chunk, each beside the least time it could take here."""

from __future__ import annotations

from typing import Any

import smolvla_fast
from benchmarks.gpu_run.chunk import HEADLINE, make_subject, variants
from benchmarks.gpu_run.record import Recorder, Run
from benchmarks.harness.account import stage_costs
from benchmarks.harness.device_timing import StageMarks, stage_marks
from benchmarks.harness.gate import check_chunk, timed
from benchmarks.harness.setup import Subject, why_not
from smolvla_fast.engine.timing import stage_times
from smolvla_fast.measure.rounds import summary

ROUNDS, SECONDS = 200, 3.0


def stages(run: Run) -> None:
    cameras, _, layers = HEADLINE
    subject = make_subject(run, None if run.rehearse else layers)
    for variant in variants():
        one(run, subject, variant, cameras)


def one(
    run: Run,
    subject: Subject,
    variant: str,
    cameras: int,
    batch: int = 1,
    backend: str = "auto",
    label: str | None = None,
) -> None:
    """Measure one variant by stage.

    variant  "stock" or a tier      backend  that the policy is patched to      label  what the report calls it
    """
    label = label or variant
    reason = why_not(variant, run.device, backend)
    if reason:
        run.leave_out(f"{label}, by stage", reason)
        return
    found: list[dict[str, float]] = []
    observation, noise = subject.observation(cameras, batch), subject.noise(batch)
    rounds = 3 if run.rehearse else ROUNDS

    def stock(recorder: Recorder) -> None:
        def check() -> dict[str, Any]:
            return check_chunk(subject.chunk(cameras, batch), subject.stock_chunk(cameras, batch), 0.0)

        timed(recorder, check, lambda: found.append(stage_times(subject.policy, observation, noise)), rounds)
        describe(recorder)

    def tier(recorder: Recorder) -> None:
        smolvla_fast.patch(subject.policy, precision=variant, backend=backend)
        marks: StageMarks

        def once() -> None:
            subject.chunk(cameras, batch)
            found.append(marks.read())

        with stage_marks(subject.policy, run.device) as marks:
            timed(recorder, lambda: subject.check(variant, cameras, batch), once, rounds)
            status = smolvla_fast.status(subject.policy)
        served = ("stages", "step_launches", "graph_nodes", "passed_over")
        recorder.extra_info["status"] = {key: getattr(status, key) for key in served}
        describe(recorder)

    def describe(recorder: Recorder) -> None:
        measured = found[1:]  # without the warm-up
        dtype = subject.compute_dtype(variant)
        language = observation["observation.language.tokens"].shape[1]
        figures = {stage: summary([times[stage] for times in measured]) for stage in measured[0]}
        costs = stage_costs(subject.policy.model, cameras, language, dtype.itemsize, batch)
        for stage, cost in costs.items():
            floor_ms = run.ceilings.floor_ms(cost.flops, cost.bytes, dtype)
            share = floor_ms / figures[stage]["p50_ms"]
            figures[stage].update(flops=cost.flops, bytes=cost.bytes, floor_ms=floor_ms, share_of_floor=share)
        where = "synchronized between stages" if variant == "stock" else "inside the captured chunk"
        recorder.extra_info.update(
            suite="stages", variant=label, backend=backend, cameras=cameras, batch=batch,
            steps=subject.policy.config.num_steps, layout=subject.layout, where=where, stages=figures,
            stage_rounds_ms=measured,
        )  # fmt: skip

    group = f"stages: {subject.group}, {cameras} cameras" + (f", batch {batch}" if batch > 1 else "")
    try:
        measure = stock if variant == "stock" else tier
        run.bench(f"{label}, {cameras} cameras, batch {batch}, by stage", group, SECONDS, measure)
    finally:
        smolvla_fast.unpatch(subject.policy)
