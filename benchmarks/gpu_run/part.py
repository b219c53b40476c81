"""One part in a process of its own: ``python -m benchmarks.gpu_run.part NAME --folder DIR --seconds S``; 1 if red."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_run.chunk import COMPILED_MODES, beside, chunk, compiled
from benchmarks.gpu_run.denoise import denoise
from benchmarks.gpu_run.ops import ops
from benchmarks.gpu_run.record import Run
from benchmarks.gpu_run.stages import stages

PARTS = {
    "chunk": chunk,
    "stages": stages,
    "denoise": denoise,
    "ops": ops,
    "beside": beside,
    **{f"compiled-{mode}": partial(compiled, mode=mode) for mode in COMPILED_MODES},
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="part")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only")
    args = parser.parse_args(arguments)
    if args.rehearse:
        torch.set_num_threads(1)
    run = Run(args.part, args.folder, args.seconds, args.rehearse, args.only)
    run.save()
    PARTS[args.part](run)
    run.save()
    return 1 if run.red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
