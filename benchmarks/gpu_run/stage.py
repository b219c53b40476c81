"""What a stage of a contact finds, in a process of its own: ``python -m benchmarks.gpu_run.stage NAME [WORD...]``.

The file that --results names is written anew after every figure, so that what ends the process takes nothing. What is wrong
in one ``attempt`` has its traceback in the output and costs no other attempt its figures; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any


class Stage:
    """device, size  of what is measured      rehearsal  on a CPU, tiny, to prove the code alone      rounds  of a time"""

    def __init__(self, name: str, path: Path | None, rehearsal: bool) -> None:
        self.name, self.path, self.rehearsal = name, path, rehearsal
        self.size, self.rounds = ("tiny", 2) if rehearsal else ("full", 50)
        self.figures: dict[str, Any] = {}
        self.red: list[dict[str, str]] = []

    @cached_property
    def device(self) -> Any:
        import torch  # seconds that a stage without a device does not take

        return torch.device("cpu" if self.rehearsal else "cuda")

    def add(self, **figures: Any) -> None:
        """Keeps figures, whatever comes after."""
        self.figures.update(figures)
        for name, value in figures.items():
            print(f"{name}: {value}", flush=True)
        self.save()

    def keep(self, name: str, data: Any) -> None:
        """Keeps what is too long for a figure, in a file of its own beside the results."""
        from benchmarks.harness.run import write_whole

        if self.path is not None:
            write_whole(self.path.with_name(f"{self.path.stem}-{name}.json"), data)

    def save(self) -> None:
        from benchmarks.harness.run import EMPTY, write_whole

        if self.path is not None:
            write_whole(self.path, {**EMPTY, "figures": self.figures, "red": self.red})

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Inside something is tried; what is wrong with it costs nothing else in this stage."""
        try:
            yield
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            first = (str(error).strip() or "no message").splitlines()[0][:300]
            self.red.append(
                dict(variant=name, name=f"{self.name}, {name}", reason=f"{type(error).__name__}: {first}")
            )
            self.save()


def stage_command(name: str, *words: str, rehearse: bool) -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks.gpu_run.stage", name, *words, *(["--rehearse"] * rehearse))


def main(arguments: Sequence[str], stages: dict[str, Callable[..., None]] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("words", nargs="*", help="what the stage is told beside its name")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--seconds", type=float, help="after which the stacks of all threads are printed")
    parser.add_argument("--results", type=Path, help="what was found, after every figure")
    args = parser.parse_args(list(arguments))
    if args.rehearse:
        # Kernels read it when they are imported.
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    faulthandler.enable()
    if args.seconds:
        # A thread of C prints them, also where Python waits for a device that hangs.
        faulthandler.dump_traceback_later(args.seconds)
    if stages is None:
        from benchmarks.gpu_run.stages import STAGES as stages
    stage = Stage(args.name, args.results and args.results.absolute(), args.rehearse)
    with stage.attempt("as a whole"):
        stages[args.name](stage, *args.words)
    return 1 if stage.red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
