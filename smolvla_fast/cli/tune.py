"""Measures on this machine who computes each op of a chunk fastest, and keeps it as a plan that `patch` uses from then on.

A chunk is recorded. Each candidate (our kernels, oneDNN, MKL or cuBLAS through torch, torch's fused attention, Triton's
tiles) is checked against fp64 first and refused where its error is more than twice eager torch's; then it is timed in
alternating rounds. A difference below the scatter keeps the default. At the end the whole chunk decides: a plan that does
not make it faster is not kept. Exit status 0 once it has measured, 2 where it could not run.
"""

from __future__ import annotations

import argparse
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..measure import system
from ..measure.console import CommandError, Console, check_writable, counted, milliseconds, write_json
from ..measure.rounds import threads
from ..patching.tuning import SECONDS, keep, tune_policy
from ..tune.result import Choice, Tuning
from . import subject

LONGEST = 86_400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject.add_arguments(parser)
    parser.add_argument(
        "--seconds", type=_seconds, default=SECONDS, help=f"how long it may take (default: {SECONDS:g})"
    )
    parser.add_argument("--plot", metavar="PATH", help="draw what was measured into this file")
    parser.add_argument("--dry-run", action="store_true", help="measure, and keep no plan")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to {LONGEST:g}")
    return value


def run(args: argparse.Namespace, console: Console) -> int:
    import smolvla_fast

    device = subject.check(args)
    if args.precision == "exact":
        raise CommandError(
            "--precision exact runs stock's own calls, whatever is faster: it has nothing to tune; accepted are the others"
        )
    if args.json is not None:
        check_writable(args.json, "--json")
    if args.plot is not None:
        _check_plot(args.plot)
    with threads(args.threads), console.share("tune") as step:
        step(0.0, "making the policy" if args.policy_path is None else "loading the policy")
        policy = subject.make_policy(args, device)
        batch, _ = subject.make_observation(policy, args, args.seed)
        try:
            smolvla_fast.patch(policy, precision=args.precision, backend=args.backend)
            found = tune_policy(policy, batch, args.seconds, step)
            path = None if args.dry_run else keep(policy, found)
        except (ValueError, RuntimeError, OSError) as reason:
            raise CommandError(str(reason)) from reason
        facts = system.facts()
    head = {**facts, "device": str(device), "policy": subject.describe(policy, args)}
    show(head, found, console)
    console.line(found.note)
    console.line(f"the plan is in {path}" if path is not None else "no plan was kept (--dry-run)")
    if args.json is not None:
        write_json(args.json, {**head, **found.to_dict(), "path": path and str(path)})
        console.line(f"wrote {args.json}")
    if args.plot is not None:
        from ..measure.plot import tuned_bars

        tuned_bars(head, found.to_dict(), args.plot)
        console.line(f"wrote {args.plot}")
    return 0


def _check_plot(path: str) -> None:
    if find_spec("matplotlib") is None:
        raise CommandError('--plot needs matplotlib; run `pip install "smolvla_fast[cli]"`')
    from ..measure.plot import KINDS

    if Path(path).suffix.lstrip(".").lower() not in KINDS:
        raise CommandError(f"--plot {path}: accepted are names that end with {', '.join(sorted(KINDS))}")
    check_writable(path, "--plot")


def show(head: dict[str, Any], found: Tuning, console: Console) -> None:
    console.line(system.headline(head))
    warning = system.busy(head)
    if warning:
        console.line(warning)
    reached = [each for each in found.choices if each.reached]
    rows = [_row(each) for each in reached if len(each.timed) > 1]
    columns = ["op", "shape class", "calls", "default", "chosen", "ms a call", "others"]
    console.table("Who computes what", columns, rows, left=2)
    for each in reached:
        for timed in each.timed:
            if timed.refused:
                console.line(f"{each.op} {each.shape}: {timed.candidate} is refused: {timed.refused}")
    alone = sum(not each.timed for each in found.choices)
    missed = len(found.choices) - len(reached) - alone
    if missed > 0:
        console.line(
            f"{counted(missed, 'shape class')} not reached in {found.seconds:.0f} s; more --seconds reach them"
        )
    if found.before is None:
        return
    rows = [
        [name, milliseconds(chunk.p50_ms), milliseconds(chunk.scatter_ms), f"{chunk.error:.2e}"]
        for name, chunk in (("by the defaults", found.before), ("by what was chosen", found.after))
        if chunk is not None
    ]
    console.table("The whole chunk", ["", "p50 ms", "scatter ms", "rel L2 to stock"], rows)


def _row(choice: Choice) -> list[str]:
    def told(name: str) -> str:
        timed = next(each for each in choice.timed if each.candidate == name)
        return "-" if timed.p50_ms is None else f"{timed.p50_ms:.3g} ± {timed.scatter_ms or 0:.1g}"

    others = [each.candidate for each in choice.timed if each.candidate != choice.chosen]
    beside = ", ".join(f"{name} {told(name)}" for name in others)
    changed = choice.chosen if choice.chosen != choice.default else "="
    return [choice.op, choice.shape, str(choice.calls), choice.default, changed, told(choice.chosen), beside]
