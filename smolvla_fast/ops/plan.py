"""A plan: who computes what on one machine, as it was measured there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LOOP = "denoise"
"""The key of the whole denoise loop: "cuda", one launch, or "ops"."""
PRODUCTS = "products"
"""The key of the dtype in which the products of tier bf16 run on a CPU: "bfloat16" or "float32"."""

LAUNCHES = "launches"
"""The key of when the launches of a GPU begin that may do so before the one ahead has ended: "early" or "in_order"."""
FIRST_STEP = "first_step"
"""The key of where a captured chunk has its first denoise step: "beside_prefix" or "behind_prefix"."""
CHUNK = "chunk"
"""The key of the whole chunk: "stock" where LeRobot's own code measured faster than the engine."""


@dataclass(frozen=True)
class Plan:
    """What was measured on one machine for one policy's shapes and tier; a choice that it does not have keeps its default.

    choices   "op shape class" -> name of a candidate
    origin    where it came from: a path, "shipped", "tuned now"
    measured  ISO date (UTC)
    """

    choices: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""
    measured: str = ""
