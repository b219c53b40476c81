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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import ROOT

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
NO_TESTS_COLLECTED = 5
# Kernels under Triton's interpreter have no speed; pytest-benchmark measures nothing in a worker of a parallel run.
UNWANTED = {"TRITON_INTERPRET", "PYTEST_XDIST_WORKER"}
GRACE = 10.0
"""Seconds that a process which was asked to end has to write what it found."""
INTERRUPTED = "interrupted; what was measured until then is here"
EMPTY: dict[str, Any] = {"benchmarks": [], "red": [], "skipped": [], "left_out": [], "interrupted": False}


@dataclass(frozen=True)
class Part:
    """A command, pytest's or a compiler's. Several may have one name.

    limit, least  seconds it may take at most, and that are kept for it however long the parts before it take
    measures      it is a suite, and writes what it found until the end of its time
    not_run       why it does not run here
    """

    name: str
    limit: float
    least: float
    command: Sequence[str] = ()
    measures: bool = False
    not_run: str = ""


class Ended(NamedTuple):
    """How a command ended. status  None where it was stopped, for the reason      tail  the last lines it printed"""

    status: int | None
    seconds: float
    tail: list[str]
    reason: str = ""


def execute(command: Sequence[str], seconds: float, environment: dict[str, str]) -> Ended:
    """Run a command with its output shown.

    Late or interrupted, it is interrupted in turn and has GRACE seconds; then it is killed with all it started.
    """
    start, reason = time.perf_counter(), ""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    tail: deque[str] = deque(maxlen=40)

    def read() -> None:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            print(f"   {line.rstrip()}", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        process.wait(timeout=seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        reason = INTERRUPTED if isinstance(error, KeyboardInterrupt) else f"not done after {seconds:.0f} s"
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(timeout=5)
    status = None if reason else process.returncode
    return Ended(status, round(time.perf_counter() - start, 1), list(tail), reason)


def suite(name: str, limit: float, least: float, *flags: str, label: str | None = None) -> Part:
    """A file of benchmarks/suites by pytest."""
    command = [
        *PYTEST, f"benchmarks/suites/{name}.py", "-s", "-p", "benchmarks.harness.plugin",
        "-W", "ignore::DeprecationWarning", f"--rootdir={ROOT}", "--benchmark-quiet", *flags,
    ]  # fmt: skip
    return Part(label or name, limit, least, command, measures=True)


def judged(part: Part, ended: Ended, found: dict[str, Any]) -> tuple[str, str]:
    """ "green", "red" or "skipped", and the reason: by what a suite found, the status, and the closing lines."""
    lines = [line.strip("= ") for line in ended.tail if line.strip()] or ["no output"]
    closing = next((line for line in reversed(lines) if re.search(r" in [\d.]+s", line)), lines[-1])
    stopped = ended.reason or INTERRUPTED * found["interrupted"]
    wrong = [f"{each['name']}: {each['reason']}" for each in found["red"]]
    no_tests = not part.measures and ended.status == NO_TESTS_COLLECTED
    if ended.status and not no_tests and not wrong:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        wrong = [f"ended with status {ended.status}: {closing}", *failed]
    nothing = "nothing was measured" * (part.measures and not found["benchmarks"])
    if reason := stopped or "; ".join(wrong) or nothing:
        return "red", reason
    skipped = no_tests or re.match(r"\d+ skipped", closing)
    return "skipped" if skipped else "green", "" if part.measures else closing


def shares(parts: Sequence[Part], left: float) -> float:
    """Seconds for the first of the parts that are still to come."""
    kept = sum(part.least for part in parts[1:])
    return min(parts[0].limit, max(left - kept, parts[0].least))


def visit(
    parts: Sequence[Part], path: Path, minutes: float, environment: dict[str, str], facts: dict[str, Any],
    state: Callable[[], Any] = dict, **about: Any,
) -> dict[str, Any]:  # fmt: skip
    """Runs the parts and writes the result after each, so that what stops a run cannot take its figures.

    facts  of the machine      state  the GPU's clocks and the like; asked before and after each part
    about  added to the result
    """
    environment = {name: value for name, value in environment.items() if name not in UNWANTED}
    machine = {**facts, "gpu_state": {"before": state()}}
    data: dict[str, Any] = {
        **about, "machine_info": {"smolvla_fast": machine}, "parts": [], "benchmarks": [], "interrupted": False,
    }  # fmt: skip
    end, names = time.perf_counter() + 60 * minutes, ", ".join(part.name for part in parts)
    print(f"{len(parts)} parts, within {minutes:.1f} minutes: {names}", flush=True)
    with tempfile.TemporaryDirectory(prefix="smolvla-bench-") as folder:
        for place, part in enumerate(parts):
            found, ended = EMPTY, Ended(None, 0.0, [])
            status, reason = "skipped", "interrupted" if data["interrupted"] else part.not_run
            if not reason:
                seconds = shares(parts[place:], end - time.perf_counter())
                result = Path(folder, f"{part.name}.json")
                print(f"== {part.name} (at most {seconds:.0f} s)", flush=True)
                # The last round and the start of the process are in the rest.
                own = (f"--seconds={0.85 * seconds:.0f}", f"--results={result}") if part.measures else ()
                ended = execute([*part.command, *own], seconds, environment)
                found = json.loads(result.read_text()) if result.is_file() else EMPTY
                status, reason = judged(part, ended, found)
            print(f"== {part.name}: {status}, {ended.seconds:.0f} s; {reason}".rstrip("; "), flush=True)
            lists = {key: found[key] for key in ("red", "skipped", "left_out")}
            said = dict(name=part.name, status=status, reason=reason, seconds=ended.seconds, tail=ended.tail)
            data["parts"].append(said | lists)
            data["benchmarks"] += found["benchmarks"]
            data["interrupted"] |= found["interrupted"] or ended.reason == INTERRUPTED
            machine["gpu_state"][f"after {part.name}"] = state()
            # What the suite knows of its process, such as the threads, is nearer to its figures.
            own_facts = found.get("machine_info", {}).get("smolvla_fast", {})
            machine.update({k: v for k, v in own_facts.items() if k not in machine or k == "threads"})
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
