"""Runs the benchmark suites of a checkout; writes JSON, a Markdown report and charts.

chunk: whole action chunks, stock and every tier, by cameras. stages: where their time goes. ops: single ops.
train: training steps, stock and patched, by batch size; it runs only when named.
cpu: stock, every CPU tier, OpenVINO and compiled stock in alternating rounds of one process, and time against cameras,
steps, threads and batch; it runs only when named.
Each is checked before it is timed, and a red check leaves no number. The defaults take minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import smolvla_fast

from ..measure import system
from ..measure.console import CommandError, Console, check_writable
from .subject import positive, resolve_device, threads

DEFAULT_SUITES = ("chunk", "stages", "ops")
"""Those that run when none is named."""
FILES = {name: f"suites/{name}.py" for name in (*DEFAULT_SUITES, "train")}
"""Those that pytest-benchmark runs."""
SUITES = (*FILES, "cpu")
CPU_CAMERAS, CPU_THREADS = 2, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "suites", nargs="*", metavar="suite", help="chunk, stages, ops, train, cpu (default: the first three)"
    )
    parser.add_argument(
        "--suite", action="append", default=[], metavar="NAME", help="the same as an option; may be repeated"
    )
    parser.add_argument("--full", action="store_true", help="many rounds: meaningful p95 and p99")
    parser.add_argument("--rounds", type=positive, help="rounds a chunk")
    parser.add_argument(
        "--with-compile", action="store_true", help="also time stock under torch.compile (minutes)"
    )
    parser.add_argument(
        "--cameras", metavar="N,N",
        help="camera counts of the chunk suite (default: 1,2,3); the cpu suite takes one, up to 4 (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--scaling", action=argparse.BooleanOptionalAction, default=True,
        help="cpu suite: time against cameras, steps, threads and batch (default: on)",
    )  # fmt: skip
    parser.add_argument("--steps", type=positive, help="denoise steps")
    parser.add_argument("--size", choices=("full", "tiny"), help="policy size (default: full)")
    parser.add_argument(
        "--layout", choices=("fp32", "mixed"), help="dtypes of the weights (CPU: fp32, GPU: mixed)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--threads", type=threads, help="CPU threads (cpu suite: 2)")
    parser.add_argument(
        "-k", metavar="EXPRESSION", help="only the benchmarks whose names match, as in pytest"
    )
    parser.add_argument(
        "--json", metavar="PATH",
        help="the figures; .md and .png lie beside them (default: benchmarks/results/<machine>-<date>.json)",
    )  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> int:
    suites = list(dict.fromkeys([*args.suites, *args.suite]))
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise CommandError(f"no suite {', '.join(map(repr, unknown))}; accepted are {', '.join(SUITES)}")
    if "cpu" in suites:
        _check_cpu(args)
    # In a test run these would fail one benchmark after the other, each with a traceback.
    if args.device is not None:
        args.device = str(resolve_device(args.device))
    if args.cameras is not None:
        args.cameras = ",".join(map(str, _counts(args.cameras)))
    folder = _folder()
    for package, module in (
        ("pytest", "pytest"),
        ("pytest-benchmark", "pytest_benchmark"),
        ("lerobot", "lerobot"),
    ):
        # Single ops need no policy.
        if find_spec(module) is None and (module != "lerobot" or suites != ["ops"]):
            raise CommandError(f'{package} is not installed; run `pip install "smolvla_fast[bench,lerobot]"`')
    path = Path(args.json).absolute() if args.json is not None else _default_path(folder / "results")
    check_writable(path, "--json")
    for suffix in (".md", ".png"):
        check_writable(path.with_suffix(suffix), "--json")
    # Kernels under Triton's interpreter have no speed.
    # pytest-benchmark measures nothing in what it takes for a worker of a parallel run.
    unwanted = {"TRITON_INTERPRET", "PYTEST_XDIST_WORKER"}
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    # Before it there may lie the figures of another day.
    path.unlink(missing_ok=True)
    status, beside = 0, None
    pytest_suites = [name for name in suites or DEFAULT_SUITES if name != "cpu"]
    if pytest_suites:
        command = [
            sys.executable, "-m", "pytest", *(str(folder / FILES[name]) for name in pytest_suites),
            "-q", "-p", "no:cacheprovider", "-p", "benchmarks.harness.plugin", f"--rootdir={folder.parent}", f"--benchmark-json={path}",
            "--benchmark-columns=median,min,max,rounds", "--benchmark-sort=fullname", *_options(args),
        ]  # fmt: skip
        status |= subprocess.run(command, cwd=folder.parent, env=environment).returncode
    if "cpu" in suites:
        beside = path.with_name(f"{path.stem}-cpu.tmp") if _written(path) else path
        command = [sys.executable, "-m", "benchmarks.suites.cpu", f"--json={beside}", *_cpu_options(args)]
        status |= subprocess.run(command, cwd=folder.parent, env=environment).returncode
    if beside is not None and beside != path and _written(beside):
        path.write_text(
            json.dumps(_joined(json.loads(path.read_text()), json.loads(beside.read_text())), indent=2)
        )
        beside.unlink()
    if not _written(path):
        raise CommandError("nothing was timed; the reason stands above")
    data = json.loads(path.read_text())
    sys.path.insert(0, str(folder.parent))
    from benchmarks.report import markdown as report

    console.line(f"wrote {path}")
    for written in report.write(data, path):
        console.line(f"wrote {written}")
    if status:
        console.line("Not everything was timed: see the failures above.")
    return 1 if status else 0


def _written(path: Path) -> bool:
    return path.is_file() and bool(path.read_text().strip())


def _joined(first: dict[str, Any], cpu: dict[str, Any]) -> dict[str, Any]:
    """One result of two runs; what both say of the machine is taken from the first."""
    facts, more = (each["machine_info"]["smolvla_fast"] for each in (first, cpu))
    machine = {**first["machine_info"], "smolvla_fast": {**more, **facts}}
    benchmarks = first["benchmarks"] + cpu["benchmarks"]
    return {**first, **cpu, "machine_info": machine, "benchmarks": benchmarks}


def _check_cpu(args: argparse.Namespace) -> None:
    """Refuses what the cpu suite has no meaning for."""
    if args.device not in (None, "cpu", "auto"):
        raise CommandError(f"--device {args.device}: suite cpu runs on the CPU; accepted are auto and cpu")
    if args.layout not in (None, "fp32"):
        raise CommandError(f"--layout {args.layout}: suite cpu compares with stock in fp32; accepted is fp32")
    if args.cameras is not None and args.cameras.strip() not in ("1", "2", "3", "4"):
        raise CommandError(
            f"--cameras {args.cameras}: suite cpu takes one count from 1 to 4; run the other suites apart"
        )
    if args.k is not None:
        raise CommandError("-k: suite cpu takes its rounds in turn, all of them; leave -k out, or the suite")


def _counts(text: str) -> list[int]:
    try:
        return [positive(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise CommandError(
            f"--cameras {text}: not counts of cameras; accepted are whole numbers above 0 with commas "
            "between them, such as 1,2,3"
        ) from error


def _folder() -> Path:
    """The suites, which lie beside the package in a checkout and are not installed."""
    for root in (Path(smolvla_fast.__file__).resolve().parent.parent, Path.cwd()):
        if (root / "benchmarks" / "suites").is_dir():
            return root / "benchmarks"
    raise CommandError(
        "the suites are in the source checkout, not in the installed package; run this in a checkout"
    )


def _default_path(results: Path) -> Path:
    return results / result_name(system.facts())


def result_name(facts: dict[str, Any], label: str = "") -> str:
    """``<machine>-<label>-<date>.json`` for these ``system.facts``."""
    parts = re.sub(r"[^a-z0-9]+", "-", f"{facts['machine']}-{label}".lower()).strip("-")
    return f"{parts}-{facts['date'][:10]}.json"


def _cpu_options(args: argparse.Namespace) -> list[str]:
    found = [f"--{flag.replace('_', '-')}" for flag in ("full", "with_compile") if getattr(args, flag)]
    found += [] if args.scaling else ["--no-scaling"]
    wishes = {"cameras": args.cameras or CPU_CAMERAS, "threads": args.threads or CPU_THREADS}
    for name in ("rounds", "steps", "size"):
        wishes[name] = getattr(args, name)
    return [*found, *(f"--{name}={value}" for name, value in wishes.items() if value is not None)]


def _options(args: argparse.Namespace) -> list[str]:
    found = [f"--{flag.replace('_', '-')}" for flag in ("full", "with_compile") if getattr(args, flag)]
    for name in ("rounds", "cameras", "steps", "size", "layout", "device", "threads"):
        if getattr(args, name) is not None:
            found.append(f"--{name}={getattr(args, name)}")
    return [*found, *(["-k", args.k] if args.k else [])]
