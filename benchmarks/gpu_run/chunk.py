"""Part ``chunk``: whole action chunks, LeRobot eager and every tier, over cameras, batch and layers, in one process.

Wall time is that of ``predict_action_chunk`` until its chunk can be read; device time what the GPU works on it; the
difference is the host's. Part ``compiled``: LeRobot's own ``compile_model`` beside the same baseline, by mode.
"""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import torch

from benchmarks.gpu_run.record import Recorder, Run
from benchmarks.harness.account import stage_costs
from benchmarks.harness.device_timing import device_rounds
from benchmarks.harness.gate import COMPILED_BOUND, check_chunk, timed
from benchmarks.harness.setup import Subject, why_not
from smolvla_fast.measure.rounds import PeakMemory, summary
from smolvla_fast.model.precision import TIERS

HEADLINE = (2, 1, 16)
"""cameras, batch, layers of the case that targets are stated for"""
ROUNDS, HEADLINE_ROUNDS = 100, 1000
SECONDS, HEADLINE_SECONDS = 2.5, 12.0
COMPILED_MODES = ("default", "max-autotune")


def plan(rehearse: bool) -> list[tuple[int, int, int | None]]:
    """(cameras, batch, layers), what matters most first, one policy after the other."""
    if rehearse:
        return [(2, 1, None), (1, 2, None)]
    every = list(product((2, 1, 3), (1, 8), (16, 32)))
    return sorted(every, key=lambda case: (case[2], case[1], case != HEADLINE))


def variants() -> list[str]:
    """Stock, and every tier that a GPU has."""
    return ["stock", *(name for name, tier in TIERS.items() if tier.quantized != "int8")]


def make_subject(run: Run, layers: int | None) -> Subject:
    size, steps = ("tiny", 2) if run.rehearse else ("full", None)
    return Subject(run.device, size=size, layout="mixed", steps=steps, layers=layers)


def chunk(run: Run) -> None:
    subject, built_for = None, None
    for cameras, batch, layers in plan(run.rehearse):
        if time.perf_counter() > run.end:
            run.leave_out(f"{cameras} cameras, batch {batch}, {layers or 'few'} layers", "no time was left")
            continue
        if subject is None or built_for != layers:
            del subject  # two full-size policies would count in each other's memory
            subject, built_for = make_subject(run, layers), layers
        for variant in variants():
            one(run, subject, variant, cameras, batch, (cameras, batch, layers) == HEADLINE)
    run.save()


def one(run: Run, subject: Subject, variant: str, cameras: int, batch: int, headline: bool) -> None:
    """Measure one variant of one case, with the policy patched for it alone."""
    import smolvla_fast

    reason = why_not(variant, run.device)
    if reason:
        run.leave_out(f"{variant}, {cameras} cameras, batch {batch}", reason)
        return
    seconds = HEADLINE_SECONDS if headline else SECONDS
    rounds = 3 if run.rehearse else HEADLINE_ROUNDS if headline else ROUNDS
    sizes = f"{cameras} cameras, batch {batch}"

    def measure(recorder: Recorder) -> None:
        info = recorder.extra_info
        memory = PeakMemory(run.device)
        if variant in TIERS:
            start = time.perf_counter()
            smolvla_fast.patch(subject.policy, precision=variant)
            subject.chunk(cameras, batch)
            first_ms = 1e3 * (time.perf_counter() - start)
            info["first_chunk_ms"] = first_ms  # compiling, where nothing was cached, and capture are in it
        timed(recorder, lambda: check(subject, variant, cameras, batch),
              lambda: subject.chunk(cameras, batch), rounds)  # fmt: skip
        if variant in TIERS:
            on_device(run, subject, recorder, cameras, batch, rounds, seconds)
            status = smolvla_fast.status(subject.policy).to_dict()
            wanted = (
                "graphs",
                "graph_nodes",
                "graph_bytes",
                "step_launches",
                "extra_bytes",
                "stages",
                "passed_over",
            )
            info["status"] = {key: status[key] for key in wanted if key in status}
            assert status["calls_stock"] == 0, f"stock ran in between: {status['last_fallback']}"
        info["peak_bytes"] = memory.bytes
        describe(run, subject, recorder, variant, cameras, batch)

    group = f"chunk: {subject.group}, {sizes}"
    try:
        run.bench(
            f"{variant}, {sizes}, {subject.policy.config.num_vlm_layers} layers", group, seconds, measure
        )
    finally:
        smolvla_fast.unpatch(subject.policy)


def check(subject: Subject, variant: str, cameras: int, batch: int) -> dict[str, Any]:
    """The gate of a variant; raises AssertionError where it is red."""
    if variant in TIERS:
        return subject.check(variant, cameras, batch)
    bound = 0.0 if variant == "stock" else COMPILED_BOUND[subject.layout]
    return check_chunk(subject.chunk(cameras, batch), subject.stock_chunk(cameras, batch), bound)


def on_device(
    run: Run, subject: Subject, recorder: Recorder, cameras: int, batch: int, rounds: int, seconds: float
) -> None:
    info = recorder.extra_info
    found = device_rounds(
        lambda: subject.queue(cameras, batch), run.device, rounds, seconds, info["p99_ms"] + 1.0
    )
    if found is not None:
        figures = summary(found)
        info.update(device_ms=figures, device_rounds_ms=found, host_ms=info["p50_ms"] - figures["p50_ms"])


def describe(run: Run, subject: Subject, recorder: Recorder, variant: str, cameras: int, batch: int) -> None:
    info, policy = recorder.extra_info, subject.policy
    dtype = subject.compute_dtype(variant)
    language = subject.observation(cameras, batch)["observation.language.tokens"].shape[1]
    costs = stage_costs(policy.model, cameras, language, dtype.itemsize, batch).values()
    floor_ms = sum(run.ceilings.floor_ms(cost.flops, cost.bytes, dtype) for cost in costs)
    best = info.get("device_ms", info)["p50_ms"]
    info.update(
        suite="chunk", variant=variant, cameras=cameras, batch=batch, layers=policy.config.num_vlm_layers,
        steps=policy.config.num_steps, layout=subject.layout, floor_ms=floor_ms, share_of_floor=floor_ms / best,
    )  # fmt: skip


def compiled(run: Run, mode: str) -> None:
    """LeRobot's ``compile_model=True`` in one mode: its method compiled, and fp32 products in TF32, as it asks for."""
    cameras, batch, layers = plan(run.rehearse)[0]
    subject = make_subject(run, layers)
    subject.stock_chunk(cameras, batch)  # what it is checked against, before anything is compiled
    model, precision = subject.policy.model, torch.get_float32_matmul_precision()
    name = f"lerobot compiled, {mode}"

    def measure(recorder: Recorder) -> None:
        torch.set_float32_matmul_precision("high")
        model.__dict__["sample_actions"] = torch.compile(model.sample_actions, mode=mode)
        start = time.perf_counter()
        subject.chunk(cameras, batch)
        recorder.extra_info["first_chunk_ms"] = 1e3 * (time.perf_counter() - start)
        memory = PeakMemory(run.device)
        rounds = 3 if run.rehearse else HEADLINE_ROUNDS
        timed(
            recorder,
            lambda: check(subject, name, cameras, batch),
            lambda: subject.chunk(cameras, batch),
            rounds,
        )
        recorder.extra_info["peak_bytes"] = memory.bytes
        describe(run, subject, recorder, name, cameras, batch)

    group = f"chunk: {subject.group}, {cameras} cameras, batch {batch}"
    try:
        run.bench(name, group, HEADLINE_SECONDS, measure)
    finally:
        model.__dict__.pop("sample_actions", None)
        torch.set_float32_matmul_precision(precision)


def beside(run: Run) -> None:
    """LeRobot eager and ours, on the one case that the compiled ones are measured on."""
    cameras, batch, layers = plan(run.rehearse)[0]
    subject = make_subject(run, layers)
    for variant in variants():
        one(run, subject, variant, cameras, batch, headline=True)
