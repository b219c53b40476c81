"""``python -m benchmarks.gpu_run report`` and ``peers``: one result file with Markdown and a chart, within eight minutes.

Needs torch, Triton, transformers, pytest, pybind11 and compilers, no network and no virtual environment; LeRobot comes
along as wheels (`make gpu-wheels`). `--part chunk` runs one part alone, `--only linear` one op, `--rehearse` all that a CPU
can. What is red has no figure, costs no other part its figures, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.harness.run import PYTEST, Part, result_name, suite, visit
from benchmarks.report import markdown
from smolvla_fast.measure import system

WHEELS, SITE = ROOT / ".whl", ROOT / "build" / "gpu-site"
REQUIREMENTS = ROOT / "benchmarks" / "gpu_run" / "requirements.txt"
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 7.5
"""Of the eight that a run may take; the rest is for the report and the last process's end."""
SMI = "clocks.sm clocks.mem clocks.max.sm clocks.max.mem power.draw power.limit temperature.gpu pstate mig.mode.current"
SANITIZED = "tests/gpu/test_sanitizer.py"
CHUNKS = "tests/gpu/test_chunk_on_device.py"
REHEARSED = ("--device=cpu", "--size=tiny", "--layout=mixed", "--steps=2", "--rounds=3", "--threads=1")


def report(args: argparse.Namespace) -> list[Part]:
    """What matters most comes first in each suite; ``--batch`` of a rehearsal is enough to see more than one.

    The extensions are compiled in place, CUDA for this GPU alone. A rehearsal compiles nothing and collects the tests. Those
    of a chunk, which fill the card or count its memory, run alone before the kernels', whose time is Triton's compiling, so
    that they run in several processes where pytest-xdist is there.
    """
    device = REHEARSED if args.rehearse else ("--device=cuda",)
    chunk, stages, ops = ("--cameras=2", "--batch=1,2"), ("--batch=1,2",), ("--choose=euler_step",)
    if not args.rehearse:
        chunk = ("--cameras=2,1,3", "--batch=1,8", "--layers=16,32", "--rounds=1000")
        stages, ops = ("--batch=1,8", "--rounds=200"), ("--rounds=50",)
    only = (f"--choose={args.only}",) if args.only else ()
    marked = (*PYTEST, *(("--collect-only",) if args.rehearse else ()), "-m")
    processes = ("-n", "4") if find_spec("xdist") and not args.rehearse else ()
    others = ("gpu", *processes, f"--ignore={CHUNKS}", f"--ignore={SANITIZED}")
    build = (sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--only")
    nothing = "a rehearsal compiles nothing" if args.rehearse else ""
    return [
        Part("build", 60, 10, (*build, "cpu"), not_run=nothing),
        Part("build", 100, 20, (*build, "cuda"), not_run=nothing),
        Part("tests", 125, 15, (*marked, "gpu and not slow", CHUNKS)),
        Part("tests", 125, 15, (*marked, *others)),
        Part("sanitizer", 120, 0, (*marked, "gpu", SANITIZED)),
        suite("chunk", 170, 75, *device, *chunk),
        suite("stages", 120, 65, *device, *stages),
        suite("ops", 120, 30, *device, *ops, *only),
    ]


def peers(args: argparse.Namespace) -> list[Part]:
    """Each mode of the compiler in a process of its own: compiling can take longer than there is time."""
    flags = ("--device=cuda", "--layers=16", "--rounds=1000", "--cameras=2")
    nothing = "a rehearsal compiles nothing: it takes minutes on a CPU" if args.rehearse else ""

    def compiled(mode: str, limit: float) -> Part:
        chosen = ("--with-compile", f"--compile-mode={mode}", "--choose", "stock or bf16 or fp32")
        return replace(suite("chunk", limit, 90, *flags, *chosen, label=f"compiled-{mode}"), not_run=nothing)

    beside = (*REHEARSED, "--cameras=2") if args.rehearse else flags
    return [
        suite("chunk", 90, 60, *beside, label="beside"),
        compiled("default", 150),
        compiled("max-autotune", 300),
    ]


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
    names = SMI.split()
    line = system.first_line(["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"])
    return line and dict(zip(names, line.split(", "), strict=False))


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
    names = list(dict.fromkeys(part.name for part in PARTS[args.kind](args)))
    if unknown := [name for name in args.part or () if name not in names]:
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
    if not args.rehearse and not torch.cuda.is_available():
        print(f"{kind}: no CUDA GPU here, or no driver for it: nothing to report (--rehearse needs none)")
        return 1
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if args.rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if missing := bring_lerobot(environment):
        print(f"{kind}: {missing}")
        return 1
    chosen = [part for part in PARTS[args.kind](args) if not args.part or part.name in args.part]
    facts = system.facts()
    label = "" if args.kind == "report" else args.kind
    path = args.out / result_name(facts, "-".join([label, *(args.part or [])]))
    facts |= {"commit": facts["commit"] or args.commit, "nvcc": system.nvcc()}
    about = dict(kind=kind, rehearsal=args.rehearse)
    data = visit(chosen, path, args.minutes, environment, facts, gpu_state, **about)
    for written in (path, *markdown.write(data, path)):
        print(f"wrote {written}")
    if red := [part["name"] for part in data["parts"] if part["status"] == "red"]:
        print(f"{kind}: red: {', '.join(red)}; what is red has no figure in the report")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
