"""`make gpu-peers`: LeRobot's own `compile_model`, modes default and max-autotune, beside LeRobot eager and ours.

Same policy, observation and noise for all; each mode in a process of its own, because compiling can take longer than there
is time, and then costs that mode alone. Options, result file and exit status as of `make gpu-report`.
"""

from __future__ import annotations

import shutil
import sys

from benchmarks.gpu_run.run import Context, Outcome, Part, main, measuring

REHEARSED_SECONDS = 60


def compiled(mode: str, limit: float, least: float) -> Part:
    """LeRobot compiled in one mode. A rehearsal tries the default mode for a minute, where a compiler is at hand."""
    part = measuring(f"compiled-{mode}", limit, least)

    def work(context: Context, seconds: float) -> Outcome:
        if not context.rehearse:
            return part.work(context, seconds)
        if mode != "default":
            return Outcome(part.name, "skipped", "a rehearsal compiles in the default mode alone")
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return Outcome(part.name, "skipped", "torch.compile on a CPU needs a C++ compiler; install g++")
        outcome = part.work(context, REHEARSED_SECONDS)
        if outcome.status == "red" and not outcome.red and outcome.seconds >= REHEARSED_SECONDS:
            outcome.status, outcome.reason = (
                "skipped",
                f"compiling takes more than {REHEARSED_SECONDS} s on this CPU",
            )
        return outcome

    return Part(part.name, limit, least, work)


PARTS = (
    measuring("beside", 90, 60),
    compiled("default", 150, 90),
    compiled("max-autotune", 300, 90),
)

if __name__ == "__main__":
    sys.exit(main("gpu-peers", PARTS, sys.argv[1:]))
