"""What compilers make of the kernels, with no GPU: ``python -m benchmarks.compiled aot`` or ``ptxas``.

Every kernel compiled for every target, by Triton or nvcc; writes benchmarks/results/<kind>.md. Ends with 1 where
a limit is passed or a kernel does not compile. Nothing in a file depends on the day or the machine, so what a fresh run
writes is compared with what is committed (tests/bench/test_aot.py, test_ptxas.py).
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.compiled.kernels import Rows, markdown, red


def compile_all(kind: Any, names: Sequence[str], targets: Sequence[str], processes: int) -> Rows:
    """kind  the module ``aot`` or ``ptxas``"""
    tasks, rows, start = kind.tasks(names, targets), {}, time.perf_counter()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for task, found in zip(tasks, pool.map(kind.compile_task, tasks), strict=True):
            name, seconds = ", ".join(map(str, task)), time.perf_counter() - start
            print(f"{name}: {len(found)} kernels, at {seconds:.0f} s", file=sys.stderr, flush=True)
            for key, cells in found.items():
                rows.setdefault(key, {}).update(cells)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.compiled", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("aot", "ptxas"))
    parser.add_argument("--only", metavar="NAME,NAME", help="these ops or sources alone (needs --out)")
    parser.add_argument("--targets", metavar="80,90a", help="these architectures alone (needs --out)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<kind>.md")
    parser.add_argument("--processes", type=int, default=2, help="compile with so many (default: 2)")
    args = parser.parse_args(arguments)
    kind = importlib.import_module(f"benchmarks.compiled.{args.kind}")
    known = kind.names()
    names = args.only.split(",") if args.only else known
    targets = args.targets.split(",") if args.targets else list(kind.TARGETS)
    if wrong := [each for each in (*names, *targets) if each not in (*known, *kind.TARGETS)]:
        accepted = f"names are {', '.join(known)}; targets {', '.join(kind.TARGETS)}"
        parser.error(f"no such name or target: {', '.join(wrong)}; {accepted}")
    if (args.only or args.targets) and args.out is None:
        parser.error("a part would replace the whole file; name another by --out")
    rows = compile_all(kind, names, targets, args.processes)
    out = args.out or ROOT / "benchmarks" / "results" / f"{args.kind}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markdown(kind, rows, targets))
    print(f"wrote {out}")
    missed = [name for name in names if name not in {key[0] for key in rows}]
    wrong = [*(f"{name}: no kernel was compiled; its call has changed" for name in missed), *red(kind, rows)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    # Kernels read it when they are imported; interpreted ones never compile.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main(sys.argv[1:]))
