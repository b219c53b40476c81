"""Runs the benchmark suites of a checkout; writes JSON, a Markdown report, the same as one HTML page, and charts.

chunk: whole action chunks, stock and every tier, by cameras. stages: where their time goes. ops: single ops.
train: training steps, stock and patched, by batch size; it runs only when named.
cpu: stock, every CPU tier, OpenVINO and compiled stock, and time against cameras, steps, threads and batch; only when named.
latency: 200 chunks of each tier one after the other, alone and beside threads that read cameras; only when named.
Each is checked before it is timed, and a red check leaves no number. Stock, tiers and peers take their rounds in turn. A
suite ends within ten minutes; what there is no time for is left out by name, and an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import smolvla_fast

from ..measure import system
from ..measure.console import CommandError, Console, check_report
from .subject import resolve_device

DEFAULT_SUITES = ("chunk", "stages", "ops")
"""Those that run when none is named."""
SUITES = (*DEFAULT_SUITES, "train", "cpu", "latency")
CPU_THREADS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sys.path.insert(0, str(_checkout()))
    from benchmarks.harness import flags

    suites = ", ".join(SUITES)
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"{suites} (default: the first three)")
    parser.add_argument(
        "--suite", action="append", default=[], metavar="NAME", help="the same as an option; repeatable"
    )
    flags.add_to(parser.add_argument)
    parser.add_argument(
        "-k", metavar="EXPRESSION", help="only benchmarks and variants whose names match, as in pytest"
    )
    parser.add_argument(
        "--json", metavar="PATH",
        help="the figures; .md, .html and .png lie beside them (default: benchmarks/results/<machine>-<date>.json)",
    )  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> int:
    from benchmarks.harness import flags
    from benchmarks.harness import run as harness

    suites = list(dict.fromkeys([*args.suites, *args.suite])) or list(DEFAULT_SUITES)
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise CommandError(f"no suite {', '.join(map(repr, unknown))}; accepted are {', '.join(SUITES)}")
    if "cpu" in suites:
        _check_cpu(args)
    for name in sorted({"cpu", "latency"} & {*suites}):
        if args.cameras is not None and args.cameras.strip() not in ("1", "2", "3", "4"):
            wants = f"suite {name} takes one count from 1 to 4; run the other suites apart"
            raise CommandError(f"--cameras {args.cameras}: {wants}")
    # In a test run these would fail one benchmark after the other, each with a traceback.
    if args.device is not None:
        args.device = str(resolve_device(args.device))
    for flag in ("cameras", "batch", "layers"):
        value = getattr(args, flag)
        if value is not None:
            setattr(args, flag, ",".join(map(str, flags.counts(value, f"--{flag}", ()))))
    for package, module in (
        ("pytest", "pytest"),
        ("pytest-benchmark", "pytest_benchmark"),
        ("lerobot", "lerobot"),
    ):
        # Single ops need no policy.
        if find_spec(module) is None and (module != "lerobot" or suites != ["ops"]):
            raise CommandError(f'{package} is not installed; run `pip install "smolvla_fast[bench,lerobot]"`')
    if args.json is not None:
        path = Path(args.json).absolute()
    else:
        path = _checkout() / "benchmarks" / "results" / harness.result_name(system.facts())
    check_report(path, (".md", ".html", ".png"))
    unfinished = path.with_suffix(".unfinished.json")  # at the path may lie the figures of another day
    console.line(f"figures gather in {unfinished} until the end")
    seconds = flags.seconds(args)
    parts = [harness.suite(name, seconds, seconds, *_options(name, args)) for name in suites]
    data = harness.visit(parts, unfinished, seconds * len(parts) / 60, dict(os.environ), system.facts())
    if not data["benchmarks"]:
        unfinished.unlink(missing_ok=True)
        raise CommandError("nothing was timed; the reason stands above")
    unfinished.replace(path)
    from benchmarks.report import markdown

    for written in (path, *markdown.write(data, path)):
        console.line(f"wrote {written}")
    if data["interrupted"]:
        raise KeyboardInterrupt
    failed = any(part["status"] == "red" for part in data["parts"])
    if failed:
        console.line("Not everything was timed: see the failures above.")
    return 1 if failed else 0


def _options(suite: str, args: argparse.Namespace) -> list[str]:
    from benchmarks.harness import flags

    own = argparse.Namespace(**{**vars(args), "seconds": None})
    if suite == "cpu":
        own.device, own.threads = "cpu", args.threads or CPU_THREADS
    return [*flags.handed_on(own), *(["--choose", args.k] if args.k else [])]


def _check_cpu(args: argparse.Namespace) -> None:
    """Refuses what the cpu suite has no meaning for."""
    if args.device not in (None, "cpu", "auto"):
        raise CommandError(f"--device {args.device}: suite cpu runs on the CPU; accepted are auto and cpu")
    if args.layout not in (None, "fp32"):
        raise CommandError(f"--layout {args.layout}: suite cpu compares with stock in fp32; accepted is fp32")


def _checkout() -> Path:
    """Where the suites are, which are not installed with the package."""
    for root in (Path(smolvla_fast.__file__).resolve().parent.parent, Path.cwd()):
        if (root / "benchmarks" / "suites").is_dir():
            return root
    raise CommandError(
        "the suites are in the source checkout, not in the installed package; run this in a checkout"
    )
