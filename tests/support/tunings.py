"""A tuning made by hand, for what shows and keeps one, and a plan that names one candidate everywhere."""

from __future__ import annotations

from typing import Any

from smolvla_fast.ops.plan import Plan
from smolvla_fast.tune.result import Choice, ChunkTime, Timed, Tuning

CHOICES = {"linear 50 36>256 float32 silu": "onednn", "attention 16x2x16": "torch"}


class Everywhere(dict[str, str]):
    """A plan that names one candidate for every shape class."""

    def __init__(self, name: str) -> None:
        super().__init__(all=name)

    def get(self, key: str, default: Any = None) -> Any:
        return None if key in ("denoise", "products") else self["all"]


def tuning_of(key: dict[str, Any], kept: bool = True) -> Tuning:
    """A tuning by hand: of two choices one changed hands."""
    timed = [
        Timed("cpu", 2.0, 0.1, 1e-7, 2e-7, None),
        Timed("onednn", 1.0, 0.1, 1e-7, 2e-7, None),
        Timed("mkl", None, None, 9e-2, 2e-7, "its error is 9.0e-02, accepted is 2.0e-07"),
    ]
    choices = [
        Choice("linear", "50 36>256 float32 silu", 40, "cpu", "onednn", True, timed),
        Choice("attention", "16x2x16", 4, "torch", "torch", False, []),
    ]
    plan = Plan(CHOICES if kept else {}, "tuned now", "2026-01-02")
    note = "" if kept else "the whole chunk is no faster"
    return Tuning(key, plan, choices, ChunkTime(10, 0.1, 1e-6), ChunkTime(9, 0.1, 2e-6), kept, note, 1.5)
