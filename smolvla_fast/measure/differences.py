"""How far apart two sets of action chunks are: by joint, by step of the chunk, by frame. Plain arrays in, JSON out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

SHARE = 0.99
"""Of a joint's values: the percentile that is reported beside the largest."""


def nan_is_worst(value: float) -> tuple[bool, float]:
    """Key for sorting and ``max``: NaN counts as more than any number."""
    return math.isnan(value), value


def by_joint(chunks: np.ndarray, reference: np.ndarray) -> list[dict[str, float]]:
    """``|chunks - reference|`` over frames and steps: the largest and the 99th percentile of each joint.

    chunks, reference   [F, S, J] in the joints' units; computed in fp64, percentiles interpolated linearly
    """
    apart = np.abs(chunks.astype(np.float64) - reference)
    largest, usual = apart.max(axis=(0, 1)), np.quantile(apart, SHARE, axis=(0, 1))
    return [{"max": float(m), "p99": float(p)} for m, p in zip(largest, usual, strict=True)]


def in_spreads(chunks: np.ndarray, reference: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """``max over joints of |chunks - reference| / spread``, [F, S]: joints of different units on one scale.

    spread   [J], what another noise changes a joint by; a joint that it does not change counts where it differs: infinite
    """
    apart = np.abs(chunks.astype(np.float64) - reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(apart == 0, 0.0, apart / spread)
    return shares.max(axis=2)


def by_step(shares: np.ndarray) -> dict[str, list[float]]:
    """Median and 99th percentile over frames of ``in_spreads``, one for each step of the chunk."""
    return {
        "p50": np.quantile(shares, 0.5, axis=0).tolist(),
        "p99": np.quantile(shares, SHARE, axis=0).tolist(),
    }


def side_by_side(places: list[int], worst: int, length: int, most: int = 6) -> list[int]:
    """Which chunks of an episode are drawn side by side: the worst and, in turn around it, those that overlap none chosen.

    places   first frame of each chunk      worst  position in ``places``      length  of a chunk, in frames
    """
    chosen = [worst]
    for each in sorted(range(len(places)), key=lambda i: abs(places[i] - places[worst])):
        if len(chosen) < most and all(abs(places[each] - places[other]) >= length for other in chosen):
            chosen.append(each)
    return sorted(chosen, key=lambda i: places[i])


def figures(
    fast: np.ndarray, reference: np.ndarray, own: np.ndarray | None, other_noise: np.ndarray
) -> dict[str, Any]:
    """A tier's figures: its joints', stock's own in that dtype, what another noise changes, and by step.

    fast, reference, own, other_noise   [F, S, J]; own is None where stock does not compute in the tier
    """
    noise = by_joint(other_noise, reference)
    spread = np.array([each["p99"] for each in noise])
    shares = in_spreads(fast, reference, spread)
    return {
        "joints": by_joint(fast, reference),
        "own": None if own is None else by_joint(own, reference),
        "noise": noise,
        "steps": by_step(shares),
        "share_of_noise": float(np.quantile(shares, SHARE)),
        "largest_share_of_noise": float(shares.max()),
        "worst": int(shares.max(axis=1).argmax()),
    }
