"""The CPU kernels compiled for aarch64, where the plain path serves, and run there under QEMU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ninja_build import CXX_FLAGS
from support.masked import masked

from smolvla_fast.ops import extension

ROOT = Path(__file__).resolve().parents[2]
CROSS, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
SYSTEM = "/usr/aarch64-linux-gnu"
pytestmark = pytest.mark.skipif(
    not CROSS, reason="no cross compiler for aarch64 (Debian: g++-aarch64-linux-gnu)"
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Every file as setup.py compiles it, but not optimised and any warning an error; of the bindings the syntax alone,
    for the Python to link them with is another processor's."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("aarch64")
    common = [CROSS, *CXX_FLAGS, "-O0", "-fopenmp", "-Werror", f"-I{ROOT / 'csrc'}"]
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-fsyntax-only"]

    def compile_one(source: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
        target = folder / f"{source.stem}.o"
        rest = include if source.stem == "bindings" else ["-c", "-o", str(target)]
        return target, subprocess.run([*common, *rest, str(source)], text=True, capture_output=True)

    sources = [
        ROOT / "csrc/bindings.cpp",
        *sorted(ROOT.glob("csrc/cpu/*.cpp")),
        ROOT / "tests/installation/aarch64.cpp",
    ]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(compile_one, sources))
    for target, result in done:
        assert result.returncode == 0, f"{target.stem}: {result.stderr[-2000:]}"
    return [target for target, _ in done if target.exists()]


def test_every_file_compiles(objects: list[Path]) -> None:
    assert len(objects) == 1 + len(list(ROOT.glob("csrc/cpu/*.cpp")))


@pytest.mark.cpu_kernels
@pytest.mark.skipif(not QEMU, reason="no qemu-aarch64 (Debian: qemu-user) to run it with")
@pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu"))
def test_the_plain_path_runs_there(objects: list[Path]) -> None:
    program = objects[0].parent / "kernels"
    subprocess.run([CROSS, "-fopenmp", *map(str, objects), "-o", str(program)], check=True)
    done = subprocess.run(
        [QEMU, "-L", SYSTEM, str(program)], text=True, capture_output=True, check=True, timeout=120
    )
    found = json.loads(done.stdout)
    assert found["best"] == 0, "aarch64 has the baseline alone"
    # Sums of up to 192 results below 2^12, added up in another order at every level.
    assert found["results"] == pytest.approx(masked(None)["results"], rel=1e-5)
