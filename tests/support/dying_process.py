"""One process of several that train: ``dying_process.py RANK POINT train ...``. The process of that rank kills itself at
POINT, step:N (before step N) or save:N (while it writes its N-th checkpoint); all others run the command as it is."""

from __future__ import annotations

import os
import signal
import sys

from smolvla_fast import training
from smolvla_fast.cli import main
from smolvla_fast.train import checkpoint


def dies_at_call(module, name, number):
    original, calls = getattr(module, name), iter(range(1, 10_000))

    def call(*arguments, **options):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, name, call)


if __name__ == "__main__":
    rank, point, *command = sys.argv[1:]
    if os.environ["RANK"] == rank:
        kind, _, number = point.partition(":")
        # A checkpoint saves its random state by save_file, when LeRobot has written the optimizer's.
        where = (training, "update") if kind == "step" else (checkpoint, "save_file")
        dies_at_call(*where, int(number))
    sys.exit(main(command))
