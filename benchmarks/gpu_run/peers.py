"""`make gpu-peers`: LeRobot's own `compile_model`, modes default and max-autotune, beside LeRobot eager and ours.

Same policy, observation and noise for all, in turn; each mode in a process of its own, because compiling can take longer
than there is time, and then costs that mode alone. Options, result file and exit status as of `make gpu-report`.
"""

from __future__ import annotations

import sys
from argparse import Namespace

from benchmarks.gpu_run.visit import REHEARSED, main
from benchmarks.harness.run import Outcome, Part, suite


def compiled(mode: str, limit: float, least: float, rehearse: bool) -> Part:
    flags = [
        "--device=cuda",
        "--cameras=2",
        "--layers=16",
        "--rounds=1000",
        "--with-compile",
        f"--compile-mode={mode}",
    ]
    if rehearse:  # compiling takes minutes on a CPU
        skipped = Outcome(f"compiled-{mode}", "skipped", "a rehearsal compiles nothing")
        return Part(skipped.name, limit, least, lambda context, seconds: skipped)
    return suite("chunk", limit, least, *flags, "--choose", "stock or bf16 or fp32", label=f"compiled-{mode}")


def parts(args: Namespace) -> list[Part]:
    flags = REHEARSED if args.rehearse else ("--device=cuda", "--layers=16", "--rounds=1000")
    return [
        suite("chunk", 90, 60, *flags, "--cameras=2", label="beside"),
        compiled("default", 150, 90, args.rehearse),
        compiled("max-autotune", 300, 90, args.rehearse),
    ]


if __name__ == "__main__":
    sys.exit(main("gpu-peers", parts, sys.argv[1:]))
