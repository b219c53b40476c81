"""compute-sanitizer over every CUDA C++ kernel: memcheck and racecheck come out clean."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smolvla_fast.measure.system import cuda_homes
from smolvla_fast.ops.availability import why_not

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
FOUND = 9
"""The exit status that the sanitizer is told to give where it found something."""
SECONDS = 240


def program() -> str | None:
    """It comes with the CUDA toolkit."""
    places = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in cuda_homes())])
    return shutil.which("compute-sanitizer", path=places)


def watch(tool: str, *arguments: str) -> tuple[int, str]:
    """The script's status under a tool that looks at our kernels alone, and all that was printed."""
    path = program()
    if path is None:
        pytest.skip("compute-sanitizer is neither on PATH nor beside nvcc; it comes with the CUDA toolkit")
    reason = why_not("cuda", torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    # Each tensor an allocation of its own: behind it nothing may be touched.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [path, "--tool", tool, "--kernel-name", "kns=smolvla", "--error-exitcode", str(FOUND), sys.executable,
         "-m", "gpu.every_kernel", *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS,
    )  # fmt: skip
    print(done.stdout[-4000:])
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("tool", "clean"), [("memcheck", r"ERROR SUMMARY: 0 errors"), ("racecheck", r"SUMMARY: 0 hazards")]
)
def test_the_sanitizer_finds_nothing(tool: str, clean: str) -> None:
    status, said = watch(tool)
    assert status == 0 and re.search(clean, said), said[-4000:]


def test_an_overrun_is_seen() -> None:
    """The filter by name lets the tool look at our kernels: else all of the above would be clean for want of a look."""
    status, said = watch("memcheck", "--overrun")
    assert status != 0 and "Invalid __global__" in said, said[-4000:]
