"""``python -m benchmarks.gpu_run report`` and ``peers``: one result file with Markdown and a chart, within eight minutes.

Needs torch, Triton, transformers, pytest, pybind11 and compilers, no network and no virtual environment; LeRobot comes
along as wheels (`make gpu-wheels`). `--part chunk` runs one part alone, `--only linear` one op, `--rehearse` all that a CPU
can. What is red has no figure, costs no other part its figures, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness.run import ROOT, Context, Outcome, Part, result_name, suite, visit

WHEELS, SITE = ROOT / ".whl", ROOT / "build" / "gpu-site"
REQUIREMENTS = ROOT / "benchmarks" / "gpu_run" / "requirements.txt"
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 7.5
"""Of the eight that a run may take; the rest is for the report and the last process's end."""
SMI = "clocks.sm clocks.mem clocks.max.sm clocks.max.mem power.draw power.limit temperature.gpu pstate mig.mode.current"


NO_TESTS_COLLECTED = 5
SANITIZED = "tests/gpu/test_sanitizer.py"
CHUNKS = "tests/gpu/test_chunk_on_device.py"
REHEARSED = ("--device=cpu", "--size=tiny", "--layout=mixed", "--steps=2", "--rounds=3", "--threads=1")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def report(args: argparse.Namespace) -> list[Part]:
    """What matters most comes first in each suite; ``--batch`` of a rehearsal is enough to see more than one."""
    device = REHEARSED if args.rehearse else ("--device=cuda",)
    chunk, stages, ops = ("--cameras=2", "--batch=1,2"), ("--batch=1,2",), ("--choose=euler_step",)
    if not args.rehearse:
        chunk = ("--cameras=2,1,3", "--batch=1,8", "--layers=16,32", "--rounds=1000")
        stages, ops = ("--batch=1,8", "--rounds=200"), ("--rounds=50",)
    only = (f"--choose={args.only}",) if args.only else ()
    return [
        Part("build", 100, 30, build),
        Part("tests", 210, 30, tests),
        Part("sanitizer", 120, 0, sanitizer),
        suite("chunk", 170, 75, *device, *chunk),
        suite("stages", 120, 65, *device, *stages),
        suite("ops", 120, 30, *device, *ops, *only),
    ]


def peers(args: argparse.Namespace) -> list[Part]:
    """Each mode of the compiler in a process of its own: compiling can take longer than there is time."""
    flags = ("--device=cuda", "--layers=16", "--rounds=1000", "--cameras=2")

    def compiled(mode: str, limit: float) -> Part:
        name = f"compiled-{mode}"
        if args.rehearse:
            skipped = Outcome(name, "skipped", "a rehearsal compiles nothing: it takes minutes on a CPU")
            return Part(name, limit, 90, lambda context, seconds: skipped)
        chosen = ("--with-compile", f"--compile-mode={mode}", "--choose", "stock or bf16 or fp32")
        return suite("chunk", limit, 90, *flags, *chosen, label=name)

    beside = (*REHEARSED, "--cameras=2") if args.rehearse else flags
    return [
        suite("chunk", 90, 60, *beside, label="beside"),
        compiled("default", 150),
        compiled("max-autotune", 300),
    ]


def build(context: Context, seconds: float) -> Outcome:
    """The extensions, in place, CUDA for this GPU alone. A rehearsal looks at what is there."""
    outcome = Outcome("build")
    if not context.rehearse:
        import torch

        major, minor = torch.cuda.get_device_capability()
        context.environment["SMOLVLA_CUDA_ARCHS"] = f"{major}{minor}" + ("a" if major >= 9 else "")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        outcome, status = context.execute("build", command, seconds)
        if status:
            outcome.end("red", f"setup.py ended with status {status}")
        if outcome.status == "red":
            return outcome
    record = ROOT / "smolvla_fast" / "_build.json"
    found = json.loads(record.read_text()) if record.is_file() else {}
    made = {kind: found.get(kind, {}) for kind in ("cpu", "cuda")}
    missing = [f"{k}: {m.get('reason', 'never compiled')}" for k, m in made.items() if not m.get("built")]
    if missing:
        outcome.end("skipped" if context.rehearse else "red", "; ".join(missing))
    return outcome


def tests(context: Context, seconds: float) -> Outcome:
    """The tests marked gpu; a rehearsal collects them.

    Those of a chunk, which fill the card or count its memory, run alone before the kernels', whose time is Triton's
    compiling, so that they run in several processes where pytest-xdist is there.
    """
    start = time.perf_counter()
    if context.rehearse:
        return judged(*context.execute("tests", [*PYTEST, "-m", "gpu", "--collect-only"], seconds))
    alone = judged(*context.execute("tests", [*PYTEST, "-m", "gpu and not slow", CHUNKS], 0.6 * seconds))
    processes = ["-n", "4"] if find_spec("xdist") else []
    others = ["-m", "gpu", *processes, f"--ignore={CHUNKS}", f"--ignore={SANITIZED}"]
    left = max(seconds - (time.perf_counter() - start), 1.0)
    rest = judged(*context.execute("tests", [*PYTEST, *others], left))
    return Outcome(
        "tests", max(alone.status, rest.status, key=["skipped", "green", "red"].index),
        f"{alone.reason}; {rest.reason}", alone.seconds + rest.seconds, alone.tail[-10:] + rest.tail,
    )  # fmt: skip


def sanitizer(context: Context, seconds: float) -> Outcome:
    """compute-sanitizer over every CUDA C++ kernel: memcheck and racecheck."""
    from smolvla_fast.measure.system import cuda_homes

    if not any(
        map(shutil.which, ["compute-sanitizer", *(f"{h}/bin/compute-sanitizer" for h in cuda_homes())])
    ):
        reason = "compute-sanitizer is neither on PATH nor beside nvcc; it comes with the CUDA toolkit"
        return Outcome("sanitizer", "skipped", reason)
    collect = ["--collect-only"] if context.rehearse else []
    return judged(*context.execute("sanitizer", [*PYTEST, "-m", "gpu", SANITIZED, *collect], seconds))


def judged(outcome: Outcome, status: int | None) -> Outcome:
    """An outcome by pytest's status and closing lines."""
    closing = next((line for line in reversed(outcome.tail) if re.search(r" in [\d.]+s", line)), "")
    if status == NO_TESTS_COLLECTED:
        outcome.end("skipped", "no test is marked so")
    elif status:
        failed = [line for line in outcome.tail if line.startswith(("FAILED", "ERROR"))]
        outcome.end("red", "; ".join([closing or f"status {status}", *failed]))
    elif status == 0:
        said = closing.strip("= ")
        outcome.end("skipped" if re.match(r"\d+ skipped", said) else "green", said)
    return outcome


PARTS = {"report": report, "peers": peers}


def bring_lerobot(environment: dict[str, str]) -> str | None:
    """Install the wheels that were brought along beside the tree, where LeRobot is missing. Returns what is wrong, or None.

    They go into build/, not into the machine's Python.
    """
    if find_spec("lerobot") is not None:
        return None
    if not SITE.is_dir():
        if not WHEELS.is_dir():
            bring = "run `make gpu-wheels` on a machine with a network and bring the folder along"
            return f"lerobot is not installed and there are no wheels in {WHEELS.name}/; {bring}"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        install += ["--find-links", str(WHEELS), "--target", str(SITE), "-r", str(REQUIREMENTS)]
        done = subprocess.run(install, text=True, capture_output=True)
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


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("report", "peers"))
    parser.add_argument("--part", action="append", help="this part alone (may be given again)")
    parser.add_argument("--only", metavar="OP", help="one op, in the part `ops`")
    parser.add_argument("--out", type=Path, help="folder of the result (benchmarks/results; a part: build/)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny: proves the code alone")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all (default: {MINUTES:g})")
    parser.add_argument("--commit", help="recorded where the tree has no history of its own")
    args = parser.parse_args(list(arguments))
    names = [part.name for part in PARTS[args.kind](args)]
    unknown = [name for name in args.part or () if name not in names]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; accepted are {', '.join(names)}")
    if args.only and "ops" in names and not args.part:
        args.part = ["ops"]
    if args.rehearse and args.out and args.out.resolve().is_relative_to(RESULTS):
        parser.error("a rehearsal has no place in benchmarks/results; give another --out")
    default = ROOT / "build" / "gpu-rehearsal" if args.rehearse else ROOT / "build" if args.part else RESULTS
    args.out = (args.out or default).absolute()
    return args


def main(arguments: Sequence[str]) -> int:
    """Run the parts that are asked for and write the result. Returns the exit status: 1 where a part is red."""
    args = parse(arguments)
    kind = f"gpu-{args.kind}"
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print(f"{kind}: no CUDA GPU here, or no driver for it: nothing to report (--rehearse needs none)")
        return 1
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for unwanted in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER"):  # a report is about compiled kernels
        environment.pop(unwanted, None)
    if args.rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if missing := bring_lerobot(environment):
        print(f"{kind}: {missing}")
        return 1

    from benchmarks.report import markdown
    from smolvla_fast.measure import system

    chosen = [part for part in PARTS[args.kind](args) if not args.part or part.name in args.part]
    facts = system.facts()
    label = "" if args.kind == "report" else args.kind
    path = args.out / result_name(facts, "-".join([label, *(args.part or [])]))
    more = {"commit": facts["commit"] or args.commit, "nvcc": system.nvcc()}
    data = visit(
        chosen, path, args.minutes, environment, gpu_state, {k: v for k, v in more.items() if v},
        kind=kind, rehearsal=args.rehearse,
    )  # fmt: skip
    markdown.write(data, path)
    for written in sorted(path.parent.glob(f"{path.stem}.*")):
        print(f"wrote {written}")
    if red := [part["name"] for part in data["parts"] if part["status"] == "red"]:
        print(f"{kind}: red: {', '.join(red)}; what is red has no figure in the report")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
