"""``python -m benchmarks.gpu_run contact``, ``report``, ``peers`` and ``bring``: docs/gpu.md says when which.

Needs torch, Triton, transformers, pytest and nvcc, no network and no virtual environment; ``bring`` builds what else helps.
`--part chunk` runs one part alone, `--only linear` one op of a report, `--rehearse` all that a CPU can. What is red has no
figure, costs no other part its figures, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.gpu_run import page
from benchmarks.gpu_run.bring import REQUIREMENTS, THINGS, WHEELS, bring, use_cache
from benchmarks.gpu_run.plans import MINUTES, PLANS
from benchmarks.gpu_run.predictions import predicted
from benchmarks.harness.run import result_name, visit
from benchmarks.report import markdown
from smolvla_fast.measure import system

SITE = ROOT / "build" / "gpu-site"
RESULTS = ROOT / "benchmarks" / "results"
SMI = "clocks.sm clocks.mem clocks.max.sm clocks.max.mem power.draw power.limit temperature.gpu pstate mig.mode.current"


def bring_lerobot(environment: dict[str, str]) -> str | None:
    """Install the wheels that were brought along beside the tree, where LeRobot is missing. Returns what is wrong, or None.

    They go into build/, not into the machine's Python.
    """
    if find_spec("lerobot") is not None:
        return None
    if not SITE.is_dir():
        if not WHEELS.is_dir():
            bring = "run `make gpu-bring` on a machine with a network and bring the folder along"
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
    parser.add_argument("kind", choices=(*PLANS, "bring"))
    parser.add_argument("--part", action="append", help="this part alone (may be given again)")
    parser.add_argument("--only", metavar="OP", help="of a report: one op, in the part `ops`")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of all that is written (a report: benchmarks/results, its log in build/)",
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny: proves the code alone")
    parser.add_argument("--minutes", type=float, help="for all parts (contact: 6, else 7.5)")
    parser.add_argument("--commit", help="recorded where the tree has no history of its own")
    args = parser.parse_args(list(arguments))
    if args.kind == "bring":
        names = list(THINGS)
    else:
        # Of a contact all that there are, also those that only a name asks for.
        every = argparse.Namespace(**{**vars(args), "part": [""]})
        names = list(dict.fromkeys(part.name for part in PLANS[args.kind](every)))
    if unknown := [name for name in args.part or () if name not in names]:
        parser.error(f"no part {', '.join(unknown)}; accepted are {', '.join(names)}")
    if args.kind == "bring":
        return args
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g}: accepted is a number above 0")
    if args.only and args.kind != "report":
        parser.error("--only is a report's; of a contact name a part")
    if args.only and not args.part:
        args.part = ["ops"]
    if args.rehearse and args.out and args.out.resolve().is_relative_to(RESULTS):
        parser.error("a rehearsal has no place in benchmarks/results; give another --out")
    args.minutes = args.minutes or MINUTES[args.kind]
    work = ROOT / "build" / ("gpu-rehearsal" if args.rehearse else f"gpu-{args.kind}")
    args.logs = (args.out or work).absolute()
    committed = args.kind != "contact" and not (args.rehearse or args.part or args.out)
    args.out = RESULTS if committed else args.logs
    return args


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if args.rehearse:
        return {**found, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    use_cache(found)
    return found


def main(arguments: Sequence[str], plans: dict[str, Any] = PLANS) -> int:
    """Run the parts that are asked for and write the result. Returns the exit status: 1 where a part is red.

    plans  the parts by kind
    """
    args = parse(arguments)
    if args.kind == "bring":
        return bring(args.part or list(THINGS))
    kind = f"gpu-{args.kind}"
    if not args.rehearse and not torch.cuda.is_available():
        print(
            f"{kind}: no CUDA GPU here, or no driver for it, by {sys.executable}: nothing to report "
            "(GPU_PYTHON=... takes another Python, --rehearse needs no GPU)"
        )
        return 1
    environment = environment_of(args)
    missing = bring_lerobot(environment)
    if missing:
        print(f"{kind}: {missing}")
        if args.kind != "contact":  # which has its headline without
            return 1
    chosen = [part for part in plans[args.kind](args) if not args.part or part.name in args.part]
    facts = system.facts()
    label = "" if args.kind == "report" else args.kind
    contact = args.kind == "contact"
    name = "contact.json" if contact else result_name(facts, "-".join([label, *(args.part or [])]))
    path = args.out / name
    facts |= {"commit": facts["commit"] or args.commit, "nvcc": system.nvcc()}
    about: dict[str, Any] = dict(kind=kind, rehearsal=args.rehearse)
    if contact:
        about["predicted"] = predicted()
    try:
        data = visit(chosen, path, args.minutes, environment, facts, gpu_state, args.logs, **about)
    except OSError as error:
        print(f"{kind}: {error}; give another folder by --out")
        return 1
    if contact:
        path.with_suffix(".md").write_text(page.markdown(data))
        written = [path.with_suffix(".md")]
        first = page.headline(data)
        print(f"headline: {first['ms']:.3f} ms ({first['by']})" if first else "headline: none")
    else:
        written = markdown.write(data, path)
    for each in (path, *written, args.logs / "log.jsonl", args.logs / f"{kind}.tar.gz"):
        print(f"wrote {each}")
    if red := [part["name"] for part in data["parts"] if part["status"] == "red"]:
        print(f"{kind}: red: {', '.join(red)}; what is red has no figure in the report")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
