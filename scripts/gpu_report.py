"""`make gpu-report`: on a machine with a GPU, compile, run the tests marked gpu, then the benchmarks.

Needs torch, pytest and a compiler, no network and no virtual environment. Exits with 1 where there is no GPU
or a test fails: a benchmark of wrong results would be worth nothing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS_COLLECTED = 5


def step(title: str, *arguments: str) -> int:
    print(f"== {title}", flush=True)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode


def main(arguments: list[str]) -> int:
    try:
        import torch
    except ImportError:
        print(f"gpu-report: {sys.executable} has no torch; run `make venv`, or name a Python: GPU_PYTHON=...")
        return 1
    if not torch.cuda.is_available():
        print("gpu-report: no CUDA GPU here, or no driver for it: there is nothing to report")
        return 1
    step("compile", "setup.py", "-q", "build_ext", "--inplace")
    tests = step("tests marked gpu", "-m", "pytest", "-q", "-m", "gpu")
    if tests not in (0, NO_TESTS_COLLECTED):
        print("gpu-report: a test is red, so nothing is timed")
        return 1
    bench = "import sys; from smolvla_fast.cli import main; sys.exit(main(['bench', *sys.argv[1:]]))"
    return step("benchmarks", "-c", bench, *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
