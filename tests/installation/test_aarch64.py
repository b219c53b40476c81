"""The CPU kernels compiled for aarch64 by GCC and by Clang, and the tests of their ops run on them under QEMU.

Four processors are played: ``max`` has every level; Cortex-A76, the Raspberry Pi 5's, and Neoverse N1, of servers, have the
dot product and neither i8mm nor bf16; Cortex-A72, the Pi 4's, has NEON alone. QEMU ends a program at an instruction that the
processor it plays lacks.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from aarch64.guest import LEVELS, Guest
from ninja_build import CXX_FLAGS

from smolvla_fast.ops import extension

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = Path("/usr/aarch64-linux-gnu")
CROSS = shutil.which("aarch64-linux-gnu-g++")
OBJDUMP = shutil.which("aarch64-linux-gnu-objdump")
CLANG = next(filter(None, map(shutil.which, ("clang++", "clang++-19", "clang++-16", "clang++-14"))), None)
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
# GCC with OpenMP, as on Linux; Clang without, as on Apple's: there the threads are our own.
COMPILERS = {
    "gcc": [str(CROSS), "-fopenmp"],
    "clang": [str(CLANG), "--target=aarch64-linux-gnu", "-pthread"],
}
HAS = {"max": LEVELS, "cortex-a76": LEVELS[:3], "neoverse-n1": LEVELS[:3], "cortex-a72": LEVELS[:2]}
# Instructions of a level, and the functions that have them.
INSTRUCTIONS = {
    "sdot": "::Dotprod::tile(",
    "smmla": "::I8mm::tile(",
    "bfdot": "::neon_bf16::tile<true",
    "bfmmla": "::neon_bf16::block_tile<",
    "bfcvtn": "::neon_bf16::",
}
FILES = ("contract", "cpu_linear", "cpu_norms", "cpu_quantize", "cpu_rope", "image_prep", "masked_attention")
# Levels that have products of 8 bits of their own, and nothing else.
OF_INTEGERS = ("neon_dotprod", "neon_i8mm")
# An emulator takes a hundred times as long: SmolVLA's own sizes, and many runs of one call, are left to whoever has minutes.
QUICK = (
    "not triton and not cuda and not 15x5x64 and not 50x720x33 and not 177x and not 2048x and not 2048-768 and not 200-768 "
    "and not 130-768 and not 480 and not do_not_depend and not whole_range and not test_contract[ and not outliers "
    f"and not eps_counts and (test_cpu_quantize or not {' and not '.join(OF_INTEGERS)})"
)

pytestmark = [
    pytest.mark.skipif(not CROSS, reason="no cross compiler for aarch64 (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
RUNS = pytest.mark.skipif(
    not QEMU, reason="no qemu-aarch64 (Debian: qemu-user or qemu-user-static) to run it with"
)


def build(compiler: str, folder: Path) -> Path:
    """The kernels and bindings as a program, compiled as setup.py does, any warning an error."""
    common = [
        *COMPILERS[compiler],
        *CXX_FLAGS,
        "-Werror",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tests/aarch64'}",
    ]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        done = subprocess.run([*common, "-c", str(source), "-o", str(target)], text=True, capture_output=True)
        assert done.returncode == 0, f"{source.name}: {done.stderr[-2000:]}"
        return target

    sources = [ROOT / "csrc/bindings.cpp", *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(map(str, pool.map(compile_one, sources)))
    subprocess.run([*COMPILERS[compiler], *objects, "-o", str(folder / "kernels")], check=True)
    return folder / "kernels"


@pytest.fixture(scope="module")
def built() -> dict[str, Path]:
    """The programs made so far, by compiler."""
    return {}


@pytest.fixture(params=["gcc", pytest.param("clang", marks=pytest.mark.long)])
def program(
    request: pytest.FixtureRequest, built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    compiler = request.param
    if compiler == "clang" and not CLANG:
        pytest.skip("no clang++ (Debian: clang)")
    if compiler not in built:
        built[compiler] = build(compiler, tmp_path_factory.mktemp(f"aarch64-{compiler}"))
    return compiler, built[compiler]


def command(program: Path, processor: str) -> list[str]:
    return [str(QEMU), "-cpu", processor, "-L", str(SYSTEM), str(program)]


@RUNS
@pytest.mark.parametrize("processor", HAS)
def test_levels_are_those_of_the_processor(program: tuple[str, Path], processor: str) -> None:
    guest = Guest(command(program[1], processor))
    assert guest.levels() == list(HAS[processor]) and guest.level() == HAS[processor][-1]
    with pytest.raises(ValueError, match="no instruction level avx2 on this processor"):
        guest.set_level("avx2")
    assert bool(guest.openmp_library()) == (program[0] == "gcc")
    guest.close()


def test_each_instruction_is_in_its_kernel_and_nowhere_else(program: tuple[str, Path]) -> None:
    """Without it a slower body served; elsewhere it would end the program of a processor that lacks it."""
    listing = subprocess.run(
        [str(OBJDUMP), "-d", "-C", "--no-show-raw-insn", str(program[1])],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    users: dict[str, set[str]] = {name: set() for name in INSTRUCTIONS}
    function = ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line
        elif (found := re.match(r" *[0-9a-f]+:\t(\w+)", line)) and found[1] in users:
            users[found[1]].add(function)
    for name, place in INSTRUCTIONS.items():
        assert users[name] and all(place in user for user in users[name]), f"{name}: {users[name]}"


@pytest.mark.cpu_kernels
@RUNS
@pytest.mark.parametrize(
    ("program", "processor"),
    [
        ("gcc", "max"),
        pytest.param("gcc", "cortex-a72", marks=pytest.mark.long),
        pytest.param("clang", "cortex-a76", marks=pytest.mark.long),
    ],
    indirect=["program"],
)
def test_ops_keep_their_contract(program: tuple[str, Path], processor: str) -> None:
    compiler, path = program
    environment = {
        **os.environ,
        "SMOLVLA_FAST_GUEST": shlex.join(command(path, processor)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        # Threads that spin while they wait would take the cores from the emulator's others.
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "2",
    }
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    files = [str(ROOT / "tests/ops" / f"test_{name}.py") for name in FILES]
    options = ["-q", "-p", "aarch64.guest", "-p", "no:cacheprovider", "-m", "cpu_kernels", "-k", QUICK]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = sum(map(int, re.findall(r"(\d+) passed", done.stdout)))
    # Some hundred tests at each level with kernels of its own: fewer means that the choice above no longer finds them.
    levels = set(HAS[processor]) - set(OF_INTEGERS)
    assert passed > 90 * len(levels), f"{compiler}, {processor}: {done.stdout[-2000:]}"
