"""`make gpu-report`: on a machine with a GPU, compile, test, then measure; one result file with Markdown and a chart.

Needs torch, Triton, transformers, pytest, pybind11 and compilers, no network and no virtual environment; LeRobot comes
along as wheels (`make gpu-wheels`). Ends within eight minutes. `--part chunk` runs one part alone, `--only linear` one op,
`--rehearse` all that a CPU can. What is red has no figure, costs no other part its figures, and makes the exit status 1.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu_run.visit import REHEARSED, main
from benchmarks.harness.run import ROOT, Context, Outcome, Part, suite

NO_TESTS_COLLECTED = 5
SANITIZED = "tests/gpu/test_sanitizer.py"
SHARDS = 4


def build(context: Context, seconds: float) -> Outcome:
    """The extensions, in place, CUDA for this GPU alone. A rehearsal looks at what is there."""
    if not context.rehearse:
        import torch

        major, minor = torch.cuda.get_device_capability()
        context.environment["SMOLVLA_CUDA_ARCHS"] = f"{major}{minor}" + ("a" if major >= 9 else "")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        outcome, status = context.execute("build", command, seconds)
        if status:
            outcome.status, outcome.reason = "red", f"setup.py ended with status {status}"
        if outcome.status == "red":
            return outcome
    else:
        outcome = Outcome("build")
    record = ROOT / "smolvla_fast" / "_build.json"
    found = json.loads(record.read_text()) if record.is_file() else {}
    missing = [f"{kind}: {found.get(kind, {}).get('reason', 'never compiled')}" for kind in ("cpu", "cuda")
               if not found.get(kind, {}).get("built")]  # fmt: skip
    if missing:
        outcome.status, outcome.reason = "skipped" if context.rehearse else "red", "; ".join(missing)
    return outcome


def tests(context: Context, seconds: float) -> Outcome:
    """The tests marked gpu; a rehearsal collects them.

    Most of their time Triton compiles, so the kernels' tests run in several processes; those of tests/gpu, which fill the
    card or count its memory, run alone before them.
    """
    end = time.perf_counter() + seconds
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if context.rehearse:
        return judged(*context.execute("tests", [*command, "--collect-only"], seconds))
    chunks = "tests/gpu/test_chunk_on_device.py"
    quick = [*command[:-3], "gpu and not slow", *command[-2:], chunks]
    alone = judged(*context.execute("tests", quick, 0.6 * seconds))

    def shard(number: int) -> Outcome:
        one = dataclasses.replace(
            context,
            environment={
                **context.environment,
                "SMOLVLA_SHARD": f"{number}/{SHARDS}",
                "OMP_NUM_THREADS": "2",
            },
        )
        left = max(end - time.perf_counter(), 1.0)
        split = [*command, "-p", "benchmarks.gpu_run.shard", f"--ignore={chunks}", f"--ignore={SANITIZED}"]
        return judged(*one.execute("tests", split, left))

    with ThreadPoolExecutor(SHARDS) as pool:
        return together([alone, *pool.map(shard, range(SHARDS))])


def together(outcomes: list[Outcome]) -> Outcome:
    """One outcome for several runs of pytest: their counts added up, and every reason."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)\b", outcome.reason):
            counts[what] = counts.get(what, 0) + int(number)
    whole = Outcome("tests", seconds=round(sum(outcome.seconds for outcome in outcomes[:1]), 1))
    whole.seconds += max((outcome.seconds for outcome in outcomes[1:]), default=0.0)
    whole.reason = ", ".join(f"{number} {what}" for what, number in counts.items())
    whole.tail = [line for outcome in outcomes for line in outcome.tail[-10:]]
    red = [outcome.reason for outcome in outcomes if outcome.status == "red"]
    if red:
        whole.status, whole.reason = "red", "; ".join([whole.reason, *red])
    elif all(outcome.status == "skipped" for outcome in outcomes):
        whole.status, whole.reason = "skipped", outcomes[0].reason
    return whole


def sanitizer(context: Context, seconds: float) -> Outcome:
    """compute-sanitizer over every CUDA C++ kernel: memcheck and racecheck."""
    from smolvla_fast.measure.system import cuda_homes

    places = ["compute-sanitizer", *(f"{home}/bin/compute-sanitizer" for home in cuda_homes())]
    if not any(map(shutil.which, places)):
        reason = "compute-sanitizer is neither on PATH nor beside nvcc; it comes with the CUDA toolkit"
        return Outcome("sanitizer", "skipped", reason)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", SANITIZED]
    if context.rehearse:
        command.append("--collect-only")
    return judged(*context.execute("sanitizer", command, seconds))


def judged(outcome: Outcome, status: int | None) -> Outcome:
    """An outcome by pytest's status and closing lines."""
    closing = next((line for line in reversed(outcome.tail) if re.search(r" in [\d.]+s", line)), "")
    if status == NO_TESTS_COLLECTED:
        outcome.status, outcome.reason = "skipped", "no test is marked so"
    elif status:
        failed = [line for line in outcome.tail if line.startswith(("FAILED", "ERROR"))]
        outcome.status, outcome.reason = "red", "; ".join([closing or f"status {status}", *failed])
    elif status == 0:
        outcome.reason = closing.strip("= ")
        if re.match(r"\d+ skipped", outcome.reason):
            outcome.status = "skipped"
    return outcome


def parts(args: Namespace) -> list[Part]:
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


if __name__ == "__main__":
    sys.exit(main("gpu-report", parts, sys.argv[1:]))
