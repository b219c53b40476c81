"""What a tuning has found: each candidate's time and error, the choices, the whole chunk before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..engine import plan_files
from ..measure.console import counted, finite, milliseconds
from ..ops.plan import CHUNK, Plan


@dataclass
class Timed:
    """One candidate for an op of one shape.

    p50_ms, scatter_ms  median and scatter of its rounds; None where it was not timed
    error               its worst error against fp64      allowed  twice that of torch's own calls
    refused             why it may not serve, or None
    """

    candidate: str
    p50_ms: float | None = None
    scatter_ms: float | None = None
    error: float | None = None
    allowed: float | None = None
    refused: str | None = None


@dataclass
class Choice:
    """One op at one shape class.

    calls    in a chunk      default, chosen  names of candidates
    reached  False: there was no time for it, and the default stays
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
    """A whole chunk: median and scatter of its rounds, relative L2 to the chunk of tier ``exact``."""

    p50_ms: float
    scatter_ms: float
    error: float


@dataclass
class Tuning:
    """One tuning.

    key            of the plan: ``plan_key.key_of``
    before, after  the chunk by the defaults and by the plan; None where it was not measured
    kept           False: the defaults stay, as ``note`` says
    seconds        that all of it took
    stock_ms       median of stock's own chunk, None where it was not measured
    """

    key: dict[str, Any]
    plan: Plan
    choices: list[Choice]
    before: ChunkTime | None
    after: ChunkTime | None
    kept: bool
    note: str
    seconds: float
    stock_ms: float | None = None

    @property
    def changed(self) -> list[Choice]:
        return [each for each in self.choices if self.kept and each.chosen != each.default]

    def verdict(self) -> str:
        """One sentence: how many choices changed hands, the chunk before and after, and how many were reached if not all."""
        every = counted(len(self.choices), "choice")
        reached = sum(each.reached for each in self.choices)
        late = "" if reached == len(self.choices) else f"; {reached} of {every} were reached in time"
        if self.plan.choices.get(CHUNK) == "stock":
            return f"stock serves: {self.note}{late}"
        if not self.changed:
            return f"the defaults stay: {self.note or 'no difference above the scatter'}{late}"
        said = f"{len(self.changed)} of {every} changed hands"
        if self.before is not None and self.after is not None:
            before, after = self.before.p50_ms, self.after.p50_ms
            said += f"; chunk {milliseconds(before)} -> {milliseconds(after)} ms ({after / before - 1:+.1%})"
            said += f", error {self.before.error:.1e} -> {self.after.error:.1e}"
        return said + (f"; {self.note}" if self.note else "") + late

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; see ``console.finite``."""
        found = asdict(replace(self, plan=Plan({})))
        plan = {
            "choices": dict(self.plan.choices),
            "origin": self.plan.origin,
            "measured": self.plan.measured,
        }
        return finite({**found, "plan": plan, "verdict": self.verdict()})

    def save(self) -> Path:
        """Keeps the plan for the next ``patch``. What was measured and is not kept leaves it.

        raises  as ``plan_files.save``
        """
        return plan_files.save(self.key, self.plan, self.to_dict())
