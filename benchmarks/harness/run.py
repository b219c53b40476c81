"""One run: parts one after the other, each in a process of its own and in its share of the time, then the result file.

A part that fails, crashes, hangs or is interrupted costs its own numbers and no other's; what it measured until then counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from smolvla_fast.measure import system

ROOT = Path(__file__).resolve().parents[2]
GRACE = 10.0
"""Seconds that a process which was asked to end has to write what it found."""
INTERRUPTED = "interrupted; what was measured until then is here"


@dataclass
class Outcome:
    """status  "green", "red" or "skipped"      reason  why it is not green      tail  the last lines it printed"""

    name: str
    status: str = "green"
    reason: str = ""
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)
    red: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def end(self, status: str, reason: str) -> Outcome:
        self.status, self.reason = status, reason
        return self


@dataclass(frozen=True)
class Part:
    """limit, least  seconds it may take at most, and that are kept for it however long the parts before it take"""

    name: str
    limit: float
    least: float
    work: Callable[[Context, float], Outcome]


@dataclass
class Context:
    """What all parts of a run share. stopped  the user interrupted it: no further part begins"""

    folder: Path
    environment: dict[str, str]
    rehearse: bool = False
    stopped: bool = False

    def execute(self, name: str, command: Sequence[str], seconds: float) -> tuple[Outcome, int | None]:
        """Run a command with its output shown; its outcome is green so far. The status is None where time ran out.

        Late or interrupted, it is interrupted in turn and has GRACE seconds; then it is killed with all it started.
        """
        outcome, start = Outcome(name), time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=self.environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        tail: deque[str] = deque(maxlen=40)

        def read() -> None:
            for line in process.stdout or ():
                tail.append(line.rstrip())
                print(f"   {line.rstrip()}", flush=True)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        status: int | None = None
        try:
            status = process.wait(timeout=seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            self.stopped = isinstance(reason, KeyboardInterrupt)
            outcome.end("red", INTERRUPTED if self.stopped else f"not done after {seconds:.0f} s")
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(timeout=GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(timeout=5)
        outcome.seconds, outcome.tail = round(time.perf_counter() - start, 1), list(tail)
        return outcome, status


def suite(name: str, limit: float, least: float, *flags: str, label: str | None = None) -> Part:
    """A file of benchmarks/suites by pytest: what it has measured by the end of its time counts."""
    label = label or name

    def work(context: Context, seconds: float) -> Outcome:
        command = [
            sys.executable, "-m", "pytest", f"benchmarks/suites/{name}.py", "-q", "-s", "-p", "no:cacheprovider",
            "-p", "benchmarks.harness.plugin", "-W", "ignore::DeprecationWarning", f"--rootdir={ROOT}", "--benchmark-quiet",
            # The last round and the start of the process are in the rest.
            f"--seconds={max(1, 0.85 * seconds):.0f}", f"--results={context.folder / f'{label}.json'}", *flags,
        ]  # fmt: skip
        outcome, status = context.execute(label, command, seconds)
        found = found_by(context.folder, label)
        outcome.red, outcome.skipped, outcome.left_out = found["red"], found["skipped"], found["left_out"]
        context.stopped |= found["interrupted"]
        last = next((line for line in reversed(outcome.tail) if line.strip()), "no output")
        reasons = (
            outcome.reason, "; ".join(f"{each['name']}: {each['reason']}" for each in outcome.red),
            INTERRUPTED if found["interrupted"] else "", f"ended with status {status}: {last}" if status else "",
            "" if found["benchmarks"] else "nothing was measured",
        )  # fmt: skip
        reason = next(filter(None, reasons), "")
        return outcome.end("red", reason) if reason else outcome

    return Part(label, limit, least, work)


def found_by(folder: Path, part: str) -> dict[str, Any]:
    path = folder / f"{part}.json"
    empty: dict[str, Any] = {"benchmarks": [], "red": [], "skipped": [], "left_out": [], "interrupted": False}
    return json.loads(path.read_text()) if path.is_file() else empty


def shares(parts: Sequence[Part], left: float) -> float:
    """Seconds for the first of the parts that are still to come."""
    kept = sum(part.least for part in parts[1:])
    return min(parts[0].limit, max(left - kept, parts[0].least))


def visit(
    parts: Sequence[Part], path: Path, minutes: float, environment: dict[str, str], state: Callable[[], Any] = dict,
    facts: dict[str, Any] | None = None, **about: Any,
) -> dict[str, Any]:  # fmt: skip
    """Runs the parts and writes the result after each, so that what stops a run cannot take its figures.

    state  the GPU's clocks and the like; asked before and after each part      facts, about  added to the result
    """
    machine = {**system.facts(), **(facts or {}), "gpu_state": {"before": state()}}
    data: dict[str, Any] = {**about, "machine_info": {"smolvla_fast": machine}, "parts": [], "benchmarks": []}
    end, names = time.perf_counter() + 60 * minutes, ", ".join(part.name for part in parts)
    print(f"{len(parts)} parts, within {minutes:.1f} minutes: {names}", flush=True)
    with tempfile.TemporaryDirectory(prefix="smolvla-bench-") as folder:
        context = Context(Path(folder), environment, about.get("rehearsal", False))
        for place, part in enumerate(parts):
            if context.stopped:
                outcome = Outcome(part.name, "skipped", "interrupted")
            else:
                seconds = shares(parts[place:], end - time.perf_counter())
                print(f"== {part.name} (at most {seconds:.0f} s)", flush=True)
                outcome = part.work(context, seconds)
            said = f": {outcome.reason}" if outcome.reason else ""
            print(f"== {part.name}: {outcome.status}, {outcome.seconds:.0f} s{said}", flush=True)
            found = found_by(context.folder, part.name)
            data["parts"].append(asdict(outcome))
            data["benchmarks"] += found["benchmarks"]
            data["interrupted"] = context.stopped
            machine["gpu_state"][f"after {part.name}"] = state()
            # What the suite knows of its process, such as the threads, is nearer to its figures.
            own = found.get("machine_info", {}).get("smolvla_fast", {})
            machine.update({key: own[key] for key in own if key not in machine or key == "threads"})
            write_whole(path, data)
    return data


def write_whole(path: Path, data: Any) -> None:
    """JSON that is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1, default=str) + "\n")
    part.replace(path)


def result_name(facts: dict[str, Any], label: str = "") -> str:
    """``<machine>-<label>-<date>.json`` for these ``system.facts``."""
    parts = re.sub(r"[^a-z0-9]+", "-", f"{facts['machine']}-{label}".lower()).strip("-")
    return f"{parts}-{facts['date'][:10]}.json"
