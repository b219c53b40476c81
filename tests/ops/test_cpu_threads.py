"""How the CPU kernels deal work to threads, counted and not timed: by OpenMP, and by the pool for compilers without it."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
from ninja_build import CXX_FLAGS

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(not CXX, reason="no C++ compiler")
BUILDS = {"OpenMP": ["-fopenmp"], "pool": ["-pthread"]}

# rows to deal, the finest and the coarse unit, as the ops ask for them at SmolVLA's sizes
DEALS = {
    "linear, 960 outputs": (80, 1, 16),
    "linear, 720 outputs": (60, 1, 16),
    "linear, 2048 outputs": (171, 1, 16),
    "attention of a chunk": (125, 4, 25),
    "attention of an image": (12 * 171, 4, 171),
    "rows of a norm": (1024, 6, 6),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("threads"), {}
    for name, flags in BUILDS.items():
        found[name] = folder / name
        command = [
            str(CXX),
            *CXX_FLAGS,
            "-O1",
            *flags,
            "-Werror",
            f"-I{ROOT / 'csrc'}",
            "-o",
            str(found[name]),
        ]
        done = subprocess.run(
            [*command, str(Path(__file__).with_name("cpu_threads.cpp"))], text=True, capture_output=True
        )
        if name == "OpenMP" and "openmp" in done.stderr.lower():
            del found[name]
            continue
        assert done.returncode == 0, done.stderr[-2000:]
    return found


def run(programs: dict[str, Path], build: str, *words: object) -> list[str]:
    if build not in programs:
        pytest.skip("this compiler has no OpenMP")
    # A thread that never gets work is a hang: two minutes are far more than any of this takes.
    done = subprocess.run([programs[build], *map(str, words)], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, f"{words}: {done.returncode} {done.stderr[-1000:]}"
    return done.stdout.splitlines()


@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("speeds", ["equal", "half of them half as fast", "one half as fast"])
@pytest.mark.parametrize("deal", DEALS)
def test_no_thread_is_left_behind(programs: dict[str, Path], deal: str, speeds: str, threads: int) -> None:
    """By the number of rows each takes: the last to end is no more than one finest range behind a split without a rest."""
    rows, finest, coarse = DEALS[deal]
    slow = {"equal": 0, "half of them half as fast": threads // 2, "one half as fast": min(1, threads - 1)}[
        speeds
    ]
    speed = [0.5] * slow + [1.0] * (threads - slow)
    fine = max(min(finest, rows // (4 * threads)), 1)
    lines = [line.split() for line in run(programs, "pool", "deal", rows, fine, coarse, *speed)]
    done, ends = [int(line[0]) for line in lines], [float(line[2]) for line in lines]
    assert sum(done) == rows and len(done) == threads
    assert max(ends) <= rows / sum(speed) + fine / min(speed)
    # A thread packs or prepares something for each range, so they may not be many: rounded down to whole units a range is at
    # least a quarter of a fair share of what is left, until two of the finest a thread are left.
    shares = max(math.log(rows / (2 * threads * fine)), 0)
    assert sum(int(line[1]) for line in lines) <= 4 * threads * shares + 2 * threads + 1


@pytest.mark.parametrize("build", BUILDS)
def test_a_thread_that_is_held_up_costs_one_range(programs: dict[str, Path], build: str) -> None:
    assert run(programs, build, "one_waits") == [str(4000 // 8)], (
        "half of a fair share, and the others took the rest"
    )


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("what", ["waits", "throws", "nested", "at_once", "threads"])
def test_calls_end_whatever_happens(programs: dict[str, Path], build: str, what: str) -> None:
    """A slow helper, a body that throws, a call from inside one, calls from several threads, more threads than cores."""
    run(programs, build, what)


def test_a_child_makes_its_own_threads(programs: dict[str, Path]) -> None:
    """Of the pool: OpenMP's runtime, which is torch's, has its own rules after a fork."""
    run(programs, "pool", "forked")
