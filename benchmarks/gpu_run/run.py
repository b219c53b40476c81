"""One run: parts one after the other, each in a process of its own and in its share of the time, then the result file."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WHEELS, SITE = ROOT / ".whl", ROOT / "build" / "gpu-site"
REQUIREMENTS = ROOT / "benchmarks" / "gpu_run" / "requirements.txt"
MINUTES = 7.5
"""Of the eight that a run may take; the rest is for the report and the last process's end."""
SMI = "clocks.sm clocks.mem clocks.max.sm clocks.max.mem power.draw power.limit temperature.gpu pstate mig.mode.current"


@dataclass
class Outcome:
    """status  "green", "red" or "skipped"      reason  why it is not green      tail  the last lines it printed"""

    name: str
    status: str = "green"
    reason: str = ""
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)
    red: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Part:
    """limit, least  seconds it may take at most, and that are kept for it however long the parts before it take"""

    name: str
    limit: float
    least: float
    work: Callable[[Context, float], Outcome]


@dataclass
class Context:
    """What all parts of a run share."""

    folder: Path
    rehearse: bool
    only: str | None
    environment: dict[str, str]

    def execute(self, name: str, command: Sequence[str], seconds: float) -> tuple[Outcome, int | None]:
        """Run a command with its output shown; its outcome is green so far. The status is None where time ran out."""
        start = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=self.environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        tail: deque[str] = deque(maxlen=40)

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                tail.append(line.rstrip())
                print(f"   {line.rstrip()}", flush=True)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            status: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(timeout=5)
        outcome = Outcome(name, seconds=round(time.perf_counter() - start, 1), tail=list(tail))
        if status is None:
            outcome.status, outcome.reason = "red", f"not done after {seconds:.0f} s"
        return outcome, status


def measuring(name: str, limit: float, least: float) -> Part:
    """A part of ``benchmarks.gpu_run.part``: what it has measured by the end of its time counts."""

    def work(context: Context, seconds: float) -> Outcome:
        command = [
            sys.executable, "-m", "benchmarks.gpu_run.part", name, "--folder", str(context.folder),
            # New benches begin until then; the last one and the start of the process are in the rest.
            "--seconds", f"{0.8 * seconds:.0f}",
            *(["--rehearse"] if context.rehearse else []), *(["--only", context.only] if context.only else []),
        ]  # fmt: skip
        outcome, status = context.execute(name, command, seconds)
        found = _found(context.folder, name)
        outcome.red, outcome.left_out = found["red"], found["left_out"]
        if outcome.red:
            outcome.status, outcome.reason = (
                "red",
                "; ".join(f"{r['name']}: {r['reason']}" for r in outcome.red),
            )
        elif status not in (0, None):
            last = next((line for line in reversed(outcome.tail) if line.strip()), "no output")
            outcome.status, outcome.reason = "red", f"ended with status {status}: {last}"
        elif not found["benchmarks"] and outcome.status == "green":
            outcome.status, outcome.reason = "red", "nothing was measured"
        return outcome

    return Part(name, limit, least, work)


def _found(folder: Path, part: str) -> dict[str, Any]:
    path = folder / f"{part}.json"
    empty: dict[str, Any] = {"benchmarks": [], "red": [], "left_out": []}
    return json.loads(path.read_text()) if path.is_file() else empty


def bring_lerobot(environment: dict[str, str]) -> str | None:
    """Install the wheels that were brought along beside the tree, where LeRobot is missing. Returns what is wrong, or None.

    They go into build/, not into the machine's Python.
    """
    if find_spec("lerobot") is not None:
        return None
    if not SITE.is_dir():
        if not WHEELS.is_dir():
            return (
                f"lerobot is not installed and there are no wheels in {WHEELS.name}/; run `make gpu-wheels` on a machine "
                "with a network and bring the folder along"
            )
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--find-links", str(WHEELS),
             "--target", str(SITE), "-r", str(REQUIREMENTS)], text=True, capture_output=True,
        )  # fmt: skip
        if done.returncode:
            shutil.rmtree(SITE, ignore_errors=True)
            return f"the wheels in {WHEELS.name}/ do not install: {done.stderr.strip().splitlines()[-1]}"
        for name in ("tests", "examples"):  # some wheels bring their own, at the top
            shutil.rmtree(SITE / name, ignore_errors=True)
    sys.path.insert(0, str(SITE))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), environment.get("PYTHONPATH")]))
    return None


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and temperature as nvidia-smi tells them; nothing is ever set. None where it does not run."""
    fields = SMI.split()
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(fields, values, strict=False))


def arguments_of(kind: str, parts: Sequence[Part], arguments: Sequence[str]) -> argparse.Namespace:
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser(prog=kind)
    parser.add_argument("--part", action="append", choices=names, help="this part alone (may be given again)")
    parser.add_argument("--only", metavar="OP", help="one op, in the part `ops`")
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default: benchmarks/results; a part alone: build/)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, tiny, in few rounds: proves the code alone"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"time for all parts (default: {MINUTES:g})"
    )
    parser.add_argument("--commit", help="recorded where the tree has no history of its own")
    args = parser.parse_args(list(arguments))
    results = ROOT / "benchmarks" / "results"
    if args.only and "ops" in names and not args.part:
        args.part = ["ops"]
    if args.rehearse and args.out and args.out.resolve().is_relative_to(results):
        parser.error("a rehearsal has no place in benchmarks/results; give another --out")
    if args.out is None:
        args.out = (
            ROOT / "build" / "gpu-rehearsal" if args.rehearse else ROOT / "build" if args.part else results
        )
    args.out = args.out.absolute()
    return args


def shares(parts: Sequence[Part], left: float) -> float:
    """Seconds for the first of the parts that are still to come."""
    kept = sum(part.least for part in parts[1:])
    return min(parts[0].limit, max(left - kept, parts[0].least))


def main(kind: str, parts: Sequence[Part], arguments: Sequence[str]) -> int:
    """Run the parts that are asked for and write the result. Returns the exit status: 1 where a part is red."""
    args = arguments_of(kind, parts, arguments)
    try:
        import torch
    except ImportError:
        print(f"{kind}: {sys.executable} has no torch; run `make venv`, or name a Python: GPU_PYTHON=...")
        return 1
    if not args.rehearse and not torch.cuda.is_available():
        print(
            f"{kind}: no CUDA GPU here, or no driver for it: there is nothing to report (--rehearse needs none)"
        )
        return 1
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)  # a report is about compiled kernels
    if args.rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    missing = bring_lerobot(environment)
    if missing:
        print(f"{kind}: {missing}")
        return 1

    from benchmarks.gpu_run import result

    chosen = [part for part in parts if not args.part or part.name in args.part]
    data = result.new(kind, args, gpu_state())
    path = args.out / result.file_name(data, args.part)
    end = time.perf_counter() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="smolvla-gpu-") as folder:
        context = Context(Path(folder), args.rehearse, args.only, environment)
        for place, part in enumerate(chosen):
            seconds = shares(chosen[place:], end - time.perf_counter())
            print(f"== {part.name} (at most {seconds:.0f} s)", flush=True)
            outcome = part.work(context, seconds)
            said = f": {outcome.reason}" if outcome.reason else ""
            print(f"== {part.name}: {outcome.status}, {outcome.seconds:.0f} s{said}", flush=True)
            result.add(data, outcome, _found(context.folder, part.name), gpu_state(), context.folder)
            result.write(data, path, last=place == len(chosen) - 1)
    for written in sorted(path.parent.glob(f"{path.stem}.*")):
        print(f"wrote {written}")
    red = [part["name"] for part in data["parts"] if part["status"] == "red"]
    if red:
        print(f"{kind}: red: {', '.join(red)}; what is red has no figure in the report")
    return 1 if red else 0
