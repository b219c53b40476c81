"""One run: parts one after the other, each in processes of its own and in its share of the time, then the result file.

A part that fails, crashes, hangs or is interrupted costs its own numbers and no other's; what it measured until then counts.
Of a visit there is after each a line more in log.jsonl, and a tar of all that was written: a run cut off leaves both.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import ROOT

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
NO_TESTS_COLLECTED = 5
# Kernels under Triton's interpreter have no speed; pytest-benchmark measures nothing in a worker of a parallel run.
UNWANTED = {"TRITON_INTERPRET", "PYTEST_XDIST_WORKER"}
GRACE = 5.0
"""Seconds that a process which was asked to end has to write what it found."""
AT_ONCE = 6
"""Processes of a part that run beside each other."""
KEPT, SHOWN = 1000, 40
"""Of a process's last lines: those that the log keeps, and the result."""
TRACEBACK = re.compile(
    r"Traceback \(most recent|Fatal Python error|Timeout \(\d|Thread 0x|=+ (FAILURES|ERRORS) ="
)
INTERRUPTED = "interrupted; what was measured until then is here"
EMPTY: dict[str, Any] = {
    "benchmarks": [], "figures": {}, "red": [], "skipped": [], "left_out": [], "interrupted": False,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A command: pytest's, a compiler's, a stage's. Several may have one name.

    limit, least  seconds it may take at most, and that are kept for it however long the parts before it take
    measures      it takes --seconds and --results, and writes what it found until the end of its time
    not_run       why it does not run here
    each          in place of one command several, by name, AT_ONCE beside each other
    """

    name: str
    limit: float
    least: float
    command: Sequence[str] = ()
    measures: bool = False
    not_run: str = ""
    each: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def commands(self) -> Mapping[str, Sequence[str]]:
        return self.each or {self.name: self.command}


class Ended(NamedTuple):
    """How a command ended. status  None where it was stopped, for the reason      tail  the last lines it printed"""

    status: int | None
    seconds: float
    tail: list[str]
    reason: str = ""

    @property
    def traceback(self) -> str:
        """Its last lines, from the first traceback among them on; all of them where there is none."""
        first = next((i for i, line in enumerate(self.tail) if TRACEBACK.match(line)), 0)
        return "\n".join(self.tail[first:])


def execute(
    command: Sequence[str], seconds: float, environment: dict[str, str], stop: threading.Event | None = None
) -> Ended:
    """Run a command with its output shown.

    Late or interrupted, it is interrupted in turn and has GRACE seconds; then it is killed with all it started.
    stop  set by another thread: interrupted
    """
    start, reason, stop = time.perf_counter(), "", stop or threading.Event()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    tail: deque[str] = deque(maxlen=KEPT)

    def read() -> None:
        for line in process.stdout or ():
            tail.append(line.rstrip().replace(f"{ROOT}{os.sep}", ""))
            print(f"   {tail[-1]}", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while process.poll() is None and not reason:
            if time.perf_counter() - start >= seconds:
                reason = f"not done after {seconds:.0f} s"
            elif stop.wait(0.05):
                reason = INTERRUPTED
    except KeyboardInterrupt:
        reason = INTERRUPTED
    if reason:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # One that waits inside a driver does not end even then; nobody waits for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
    reader.join(timeout=5)
    status = None if reason else process.returncode
    return Ended(status, round(time.perf_counter() - start, 1), list(tail), reason)


def together(
    commands: Mapping[str, Sequence[str]], seconds: float, environment: dict[str, str]
) -> dict[str, Ended]:
    """Run the commands, AT_ONCE of them beside each other, all within so many seconds."""
    if len(commands) == 1:
        return {name: execute(command, seconds, environment) for name, command in commands.items()}
    end, stop = time.perf_counter() + seconds, threading.Event()

    def one(command: Sequence[str]) -> Ended:
        left = end - time.perf_counter()
        if left < 1 or stop.is_set():
            return Ended(None, 0.0, [], INTERRUPTED if stop.is_set() else "no time was left")
        return execute(command, left, environment, stop)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = {name: pool.submit(one, command) for name, command in commands.items()}
        try:
            return {name: each.result() for name, each in found.items()}
        except KeyboardInterrupt:
            stop.set()
            return {name: each.result() for name, each in found.items()}


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
    nothing = "nothing was measured" * (part.measures and not found["benchmarks"] and not found["figures"])
    if reason := stopped or "; ".join(wrong) or nothing:
        return "red", reason
    skipped = no_tests or re.match(r"\d+ skipped", closing)
    return "skipped" if skipped else "green", "" if part.measures else closing


def shares(parts: Sequence[Part], left: float) -> float:
    """Seconds for the first of the parts that are still to come."""
    kept = sum(part.least for part in parts[1:])
    return min(parts[0].limit, max(left - kept, parts[0].least), left)


def pytest_of(*arguments: str) -> tuple[str, ...]:
    """pytest, and a line of JSON for each test in the file that --results names."""
    return (*PYTEST, "-p", "benchmarks.harness.outcomes", *arguments)


def run_part(part: Part, stem: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a part's commands. Returns its line of the log, with ``benchmarks`` and ``tail`` beside it."""
    commands, files = {}, {}
    for name, command in part.commands.items():
        files[name] = Path(f"{stem}-{name}.json")
        logs = "benchmarks.harness.outcomes" in command
        # The last round and the start of the process are in the rest.
        own = (f"--seconds={0.85 * seconds:.0f}",) * part.measures
        commands[name] = [*command, *own, *([f"--results={files[name]}"] if part.measures or logs else [])]
    start, found = (
        time.perf_counter(),
        {"name": part.name, "status": "", "reason": "", "seconds": 0.0, "tail": [], **EMPTY},
    )
    statuses, reasons, tracebacks = [], [], []
    for name, ended in together(commands, seconds, environment).items():
        own_found = {**EMPTY, **read(files[name])}
        status, reason = judged(part, ended, own_found)
        statuses.append(status)
        reasons += [f"{name}: {reason}" if part.each else reason] if reason else []
        tracebacks += (
            [f"{name}: {ended.traceback}" if part.each else ended.traceback] if status == "red" else []
        )
        for key in ("benchmarks", "red", "skipped", "left_out"):
            found[key] = [*found[key], *own_found[key]]
        found["figures"] = {
            **found["figures"],
            **({name: own_found["figures"]} if part.each else own_found["figures"]),
        }
        found["tail"] = [*found["tail"], *ended.tail[-SHOWN:]]
        found["machine_info"] = own_found.get("machine_info", {})
        found["interrupted"] |= own_found["interrupted"] or ended.reason == INTERRUPTED
    found["status"] = next((each for each in ("red", "green") if each in statuses), "skipped")
    found["seconds"] = round(time.perf_counter() - start, 1)
    return {**found, "reason": "; ".join(reasons), "traceback": "\n\n".join(tracebacks)}


def read(path: Path) -> dict[str, Any]:
    """What a process wrote; {} where it wrote nothing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def new_benchmarks(
    found: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Those of variants that have no row yet: of stock, which every process times beside its own, the first's."""
    names = {(each["group"], each["extra_info"]["variant"]) for each in known}
    return (each for each in found if (each["group"], each["extra_info"]["variant"]) not in names)


def visit(
    parts: Sequence[Part], path: Path, minutes: float, environment: dict[str, str], facts: dict[str, Any],
    state: Callable[[], Any] = dict, logs: Path | None = None, **about: Any,
) -> dict[str, Any]:  # fmt: skip
    """Runs the parts and writes the result after each, so that what stops a run cannot take its figures.

    facts  of the machine      state  the GPU's clocks and the like; asked before and after each part
    logs   folder of log.jsonl and of the tar; None: there are none      about  added to the result
    """
    environment = {name: value for name, value in environment.items() if name not in UNWANTED}
    machine = {**facts, "gpu_state": {"before": state()}}
    data: dict[str, Any] = {
        **about, "machine_info": {"smolvla_fast": machine}, "parts": [], "benchmarks": [], "interrupted": False,
    }  # fmt: skip
    end, names = time.perf_counter() + 60 * minutes, ", ".join(part.name for part in parts)
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "log.jsonl").write_text("")
    print(f"{len(parts)} parts, within {minutes:.1f} minutes: {names}", flush=True)
    with tempfile.TemporaryDirectory(prefix="smolvla-bench-") as folder:
        for place, part in enumerate(parts):
            reason = "interrupted" if data["interrupted"] else part.not_run
            seconds = shares(parts[place:], end - GRACE - time.perf_counter())
            if not reason and seconds < min(part.limit, 2.0):
                reason = "no time was left"
            found = {
                **EMPTY,
                "name": part.name,
                "status": "skipped",
                "reason": reason,
                "seconds": 0.0,
                "tail": [],
            }
            if not reason:
                print(f"== {part.name} (at most {seconds:.0f} s)", flush=True)
                found = run_part(part, Path(folder, f"{place:02}"), seconds, environment)
            said = f"{found['seconds']:.0f} s; {found['reason']}"
            print(f"== {part.name}: {found['status']}, {said}".rstrip("; "), flush=True)
            data["benchmarks"] += new_benchmarks(found.pop("benchmarks"), data["benchmarks"])
            data["interrupted"] |= found.pop("interrupted")
            # What the suite knows of its process, such as the threads, is nearer to its figures.
            own_facts = found.pop("machine_info", {}).get("smolvla_fast", {})
            machine.update({k: v for k, v in own_facts.items() if k not in machine or k == "threads"})
            machine["gpu_state"][f"after {part.name}"] = state()
            data["parts"].append({key: value for key, value in found.items() if key != "traceback"})
            write_whole(path, data)
            if logs is not None:
                log = logs / "log.jsonl"
                write_line(log, {key: value for key, value in found.items() if key != "tail"})
                every = [log, path, *sorted(Path(folder).iterdir())]
                write_tar(logs / f"{about.get('kind', path.stem)}.tar.gz", every)
    return data


def write_line(path: Path, line: dict[str, Any]) -> None:
    """A line more, on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_tar(path: Path, files: Sequence[Path]) -> None:
    """A tar that is never half there, of files by their names."""
    part = path.with_suffix(".part")
    with tarfile.open(part, "w:gz") as tar:
        for each in files:
            tar.add(each, each.name)
    part.replace(path)


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
