"""Time of a chunk against cameras, denoise steps, threads and batch; each point is checked against stock first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.checks import check_point
from benchmarks.harness.gate import Red
from benchmarks.harness.variants import CPU, MOST_CAMERAS, Arena, Contestant, chunk
from smolvla_fast.measure.rounds import summary, threads, timed_ms

CAMERAS = tuple(range(1, MOST_CAMERAS + 1))
STEPS = (1, 2, 5, 10)
BATCHES = (1, 2, 4, 8)
LONG_MS = 3000.0
"""From here on a first round is as good as the next ones, and counts."""
SECONDS_A_POINT = 6.0


@dataclass(frozen=True)
class Point:
    """axis is one of "cameras", "steps", "threads", "batch"; all the others are as in the table."""

    axis: str
    value: int


def points(most_threads: int) -> list[Point]:
    axes = {"cameras": CAMERAS, "steps": STEPS, "threads": range(1, most_threads + 1), "batch": BATCHES}
    return [Point(axis, value) for axis, values in axes.items() for value in values]


def batched(singles: list[tuple[dict[str, Tensor], Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Observations of one sample each as a batch."""
    observations = [observation for observation, _ in singles]
    joined = {key: torch.cat([each[key] for each in observations]) for key in observations[0]}
    return joined, torch.cat([noise for _, noise in singles])


@contextmanager
def at(arena: Arena, point: Point) -> Iterator[list[tuple[dict[str, Tensor], Tensor]]]:
    """Sets steps and threads; yields the point's observations, one for each sample."""
    config = arena.policy.config
    before = config.num_steps
    config.num_steps = point.value if point.axis == "steps" else before
    cameras = point.value if point.axis == "cameras" else arena.cameras
    samples = point.value if point.axis == "batch" else 1
    try:
        with threads(point.value if point.axis == "threads" else None):
            yield [arena.inputs(cameras, seed) for seed in range(samples)]
    finally:
        config.num_steps = before


def measure(
    arena: Arena, stock: Contestant, tiers: list[Contestant], rounds: int, seconds: float, step: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every point of stock and the tiers; of a batch stock computes the first and the last sample alone, as a check.

    seconds  after so many no further point is begun      step  called with a label before each point
    returns  one dict a point and contestant, with "p50_ms" or "red"; and the points that were left out
    """
    found: list[dict[str, Any]] = []
    left_out: list[str] = []
    singles: dict[int, Tensor] = {}
    end = time.perf_counter() + seconds
    for point in points(torch.get_num_threads()):
        label = f"{point.axis} {point.value}"
        if time.perf_counter() > end:
            left_out.append(label)
            continue
        step(f"scaling: {label}")
        with at(arena, point) as samples:
            if point.axis == "batch":
                which = sorted({0, len(samples) - 1})
                for index in which:
                    if index not in singles:
                        singles[index] = chunk(stock.policy, samples[index])
                truth = torch.cat([singles[index] for index in which])
            else:
                which = [0]
                ms, truth = timed_ms(lambda: chunk(stock.policy, samples[0]), CPU)
                found.append(_row(point, "stock", [ms]))
            inputs = batched(samples)
            found += [_point(point, tier, inputs, which, truth, rounds) for tier in tiers]
    return found, left_out


def _row(point: Point, variant: str, rounds_ms: list[float], **facts: Any) -> dict[str, Any]:
    return {
        "axis": point.axis,
        "value": point.value,
        "variant": variant,
        "rounds_ms": rounds_ms,
        **(summary(rounds_ms) if rounds_ms else {}),
        **facts,
    }


def _point(
    point: Point, tier: Contestant, inputs: Any, which: list[int], truth: Tensor, rounds: int
) -> dict[str, Any]:
    def run() -> Tensor:
        return chunk(tier.policy, inputs)

    first_ms, chunks = timed_ms(run, CPU)
    try:
        facts = check_point(tier.precision, chunks[which], truth)
    except Red as reason:
        return _row(point, tier.name, [], red=str(reason))
    rounds_ms = [first_ms] if first_ms > LONG_MS else []
    while len(rounds_ms) < rounds and (not rounds_ms or 1e-3 * sum(rounds_ms) < SECONDS_A_POINT):
        rounds_ms.append(timed_ms(run, CPU)[0])
    return _row(point, tier.name, rounds_ms, **facts)
