"""What a tuning found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..ops.plan import Plan


@dataclass
class Timed:
    """One candidate of one choice.

    p50_ms, scatter_ms  median of a sweep over the recorded calls, by call, and half the distance of its quartiles
    error, allowed      worst error against fp64, and the most that the op contract allows: twice eager torch's
    refused             why it was not timed, or None
    """

    candidate: str
    p50_ms: float | None = None
    scatter_ms: float | None = None
    error: float | None = None
    allowed: float | None = None
    refused: str | None = None


@dataclass
class Choice:
    """Who computes one op in one shape class.

    calls    in a chunk      reached  whether there was time to measure it
    """

    op: str
    shape: str
    calls: int
    default: str
    chosen: str
    reached: bool = False
    timed: list[Timed] = field(default_factory=list)


@dataclass
class ChunkTime:
    """A whole chunk.      error  relative L2 to the chunk of tier ``exact``, which is stock's own"""

    p50_ms: float
    scatter_ms: float
    error: float


@dataclass
class Tuning:
    """All of it.

    key     what the plan holds for      plan  what to use from now on      kept  whether it is ahead of the defaults
    before  the chunk by the defaults    after  by what was chosen; None where there was no time
    note    one sentence                 seconds  how long it took
    """

    key: dict[str, Any]
    plan: Plan
    choices: list[Choice]
    before: ChunkTime | None
    after: ChunkTime | None
    kept: bool
    note: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("key", "kept", "note", "seconds")}
        return {
            **found,
            "plan": dict(self.plan.choices),
            "choices": [asdict(each) for each in self.choices],
            "before": self.before and asdict(self.before),
            "after": self.after and asdict(self.after),
        }
