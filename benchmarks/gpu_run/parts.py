"""What a visit to a GPU consists of: compile, test, measure; and LeRobot's own ``compile_model`` beside ours."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from argparse import Namespace
from importlib.util import find_spec

from benchmarks.harness.run import ROOT, Context, Outcome, Part, suite

NO_TESTS_COLLECTED = 5
SANITIZED = "tests/gpu/test_sanitizer.py"
CHUNKS = "tests/gpu/test_chunk_on_device.py"
REHEARSED = ("--device=cpu", "--size=tiny", "--layout=mixed", "--steps=2", "--rounds=3", "--threads=1")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def report(args: Namespace) -> list[Part]:
    """What matters most comes first in each suite; ``--batch`` of a rehearsal is enough to see more than one."""
    only = ["--choose", args.only] if args.only else []
    if args.rehearse:
        chunk = [*REHEARSED, "--cameras=2", "--batch=1,2"]
        stages = [*REHEARSED, "--batch=1,2"]
        ops = [*REHEARSED, *(only or ["--choose", "euler_step"])]
    else:
        chunk = ["--device=cuda", "--cameras=2,1,3", "--batch=1,8", "--layers=16,32", "--rounds=1000"]
        stages = ["--device=cuda", "--batch=1,8", "--rounds=200"]
        ops = ["--device=cuda", "--rounds=50", *only]
    return [
        Part("build", 100, 30, build),
        Part("tests", 210, 30, tests),
        Part("sanitizer", 120, 0, sanitizer),
        suite("chunk", 170, 75, *chunk),
        suite("stages", 120, 65, *stages),
        suite("ops", 120, 30, *ops),
    ]


def peers(args: Namespace) -> list[Part]:
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

    places = ["compute-sanitizer", *(f"{home}/bin/compute-sanitizer" for home in cuda_homes())]
    if not any(map(shutil.which, places)):
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
