"""Who computes what on one machine, as measured there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Who computes what on one machine: "op shape-class" -> name of a candidate.

    choices   e.g. {"linear 2048 768>3072 float32 gelu_tanh": "onednn"}
    origin    where it came from: a path, "shipped", "tuned now"
    measured  ISO date (UTC) of the measurement
    """

    choices: Mapping[str, str]
    origin: str = ""
    measured: str = ""
