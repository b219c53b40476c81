"""Measures on this machine who computes each op of a policy fastest, and keeps that for the next patch of such a policy.

Every candidate is compared with fp64 first; one that errs more than twice what torch's own calls do is refused. A candidate
that is not faster by more than the scatter leaves the default. Then the whole chunk is timed before and after. What was
not reached within --seconds keeps its default. Tier exact has nothing to tune.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..engine import plan_files
from ..measure import system
from ..measure.console import CommandError, Console, check_writable, counted, milliseconds, write_json
from ..measure.rounds import threads
from ..model.precision import TIERS
from ..patching import tuning
from ..patching.settings import DISABLE, disabled
from ..tune.result import Choice, Timed, Tuning
from ..tune.tuner import SECONDS
from . import subject
from .demo import check_plot, draw

MOST_SECONDS = 86_400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject.add_arguments(parser)
    parser.add_argument(
        "--seconds", type=seconds, default=SECONDS, help=f"how long it may take (default: {SECONDS:.0f})"
    )
    parser.add_argument("--plot", metavar="PATH", help="a chart of defaults beside choices")
    parser.add_argument("--dry-run", action="store_true", help="measure and show, but keep no plan")


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds above 0 and up to {MOST_SECONDS:,}"
        )
    return value


def run(args: argparse.Namespace, console: Console) -> int:
    if args.precision == "exact":
        accepted = ", ".join(name for name in ("auto", *TIERS) if name != "exact")
        raise CommandError(f"--precision exact: {tuning.NOTHING}; accepted are {accepted}")
    device = subject.check(args)
    if disabled():
        raise CommandError(f"{DISABLE} is set, so every policy runs stock; unset it to tune")
    for path, option in ((args.json, "--json"), (args.plot, "--plot")):
        if path is not None:
            check_writable(path, option)
    if args.plot is not None:
        check_plot(args.plot)
    path, fault = None, None
    try:
        if not args.dry_run:
            plan_files.check_writable()
        with threads(args.threads):
            found, policy = measure(args, device, console)
            facts = system.facts()
    except plan_files.CannotSave as error:
        raise CommandError(f"{error}, or measure alone with --dry-run") from error
    try:
        path = None if args.dry_run else str(found.save())
    except (
        plan_files.CannotSave
    ) as error:  # the disk has become full, say: what was measured is shown all the same
        fault = error
    written = {
        **facts, "device": str(device), "policy": subject.describe(policy, args), **found.to_dict(), "path": path,
    }  # fmt: skip
    show(found, written, console)
    if args.json is not None:
        write_json(args.json, written)
        console.line(f"wrote {args.json}")
    if args.plot is not None:
        draw("tuning", written, args.plot, console)
    if fault is not None:
        raise CommandError(str(fault)) from fault
    if path is None:
        console.line("no plan was written: --dry-run")
    else:
        count = counted(written["threads"], "thread")
        dtypes = " and ".join(written["policy"]["dtypes"])
        console.line(
            f"wrote {path}, which patch(policy) uses from now on for a policy of these shapes in {dtypes}, where torch runs "
            f"{count}"
        )
    console.line(found.verdict())
    return 0


def measure(args: argparse.Namespace, device: Any, console: Console) -> tuple[Tuning, Any]:
    """Tunes the policy of the arguments."""
    import smolvla_fast

    with console.progress("tune") as show:
        show("making the policy" if args.policy_path is None else "loading the policy", 0.0)
        policy = subject.make_policy(args, device)
        batch, noise = subject.make_observation(policy, args, args.seed)
        try:
            smolvla_fast.patch(policy, precision=args.precision, backend=args.backend, tune="cached")
            return tuning.tune_policy(policy, batch, noise, seconds=args.seconds, progress=show), policy
        except (ValueError, RuntimeError) as reason:
            raise CommandError(str(reason)) from reason


def show(found: Tuning, written: dict[str, Any], console: Console) -> None:
    """Prints the tables."""
    console.line(system.headline(written))
    subject.say_whose(written["policy"], console)
    warning = system.busy(written)
    if warning:
        console.line(warning)
    console.line()
    columns = ["op", "shape", "calls", "candidate", "", "p50 ms", "scatter", "error", "allowed"]
    rows: list[list[Any]] = []
    refused = []
    for choice in found.choices:
        heads: list[Any] = [choice.op, choice.shape, choice.calls]
        for timed in choice.timed or [Timed(choice.default, None, None, None, None, None)]:
            rows.append([*heads, timed.candidate, role(choice, timed, found.kept), *figures(timed)])
            heads = ["", "", ""]
            if timed.refused is not None:
                refused.append(
                    f"{timed.candidate} for {choice.op} {choice.shape} is refused: {timed.refused}"
                )
    console.table(f"Ops of one chunk, precision {found.key['tier']}", columns, rows, left=5)
    for line in refused:
        console.line(line)
    late = sum(not choice.reached for choice in found.choices)
    if late:
        console.line(
            f"{late} of {counted(len(found.choices), 'choice')} were not reached in {found.seconds:.0f} s and keep their "
            "default; give more --seconds"
        )
    rows = [] if found.stock_ms is None else [["stock", milliseconds(found.stock_ms), "-", "-"]]
    rows += [
        [name, milliseconds(chunk.p50_ms), milliseconds(chunk.scatter_ms), f"{chunk.error:.2e}"]
        for name, chunk in (("defaults", found.before), ("plan", found.after))
        if chunk is not None
    ]
    if rows:
        console.table("The whole chunk", ["", "p50 ms", "scatter", "error"], rows)


def role(choice: Choice, timed: Timed, kept: bool) -> str:
    """What one candidate is to the choice."""
    if not choice.reached and timed.p50_ms is None:
        return "not reached"
    if timed.refused is not None:
        return "refused"
    chosen = choice.chosen if kept else choice.default
    return ", ".join(
        name for name, whose in (("default", choice.default), ("chosen", chosen)) if timed.candidate == whose
    )


def figures(timed: Timed) -> list[str]:
    def cell(value: float | None, form: Any) -> str:
        return "-" if value is None else form(value)

    def power(value: float) -> str:
        return f"{value:.1e}"

    return [
        cell(timed.p50_ms, milliseconds),
        cell(timed.scatter_ms, milliseconds),
        cell(timed.error, power),
        cell(timed.allowed, power),
    ]
