"""For which GPUs the CUDA part is compiled, and what is said where it is not. No GPU is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What nvcc 13 and nvcc 12 answer to --list-gpu-arch, in part.
NVCC_13 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
NVCC_12 = (50, 70, 75, 80, 86, 87, 89, 90)
NVCC_10 = (35, 50, 70, 75)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """csrc/ninja_build.py on a machine without nvidia-smi and without a driver."""
    spec = importlib.util.spec_from_file_location("ninja_build", ROOT / "csrc" / "ninja_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("SMOLVLA_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "driver_gpus", list)
    return module


def smi(folder: Path, said: str, status: int = 0) -> None:
    """An nvidia-smi that answers this to --query-gpu=compute_cap."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n/bin/cat <<'TEXT'\n{said}\nTEXT\nexit {status}\n")
    program.chmod(0o755)


def archs(build: ModuleType, monkeypatch: pytest.MonkeyPatch, nvcc: tuple[int, ...]) -> list[str]:
    known = "".join(f"compute_{n}\n" for n in nvcc)
    monkeypatch.setattr(build, "run", lambda *command: known)
    return build.cuda_archs("nvcc", build.gpus_to_compile_for(asked=False))


@pytest.mark.parametrize(
    ("said", "nvcc", "expected"),
    [
        pytest.param("9.0", NVCC_13, ["90a"], id="one"),
        pytest.param("9.0\n9.0\n9.0", NVCC_13, ["90a"], id="many of a kind"),
        pytest.param("8.9\n8.6", NVCC_13, ["86", "89"], id="two kinds"),
        pytest.param("8.7", NVCC_13, ["87"], id="Jetson"),
        pytest.param("10.0", NVCC_13, ["100a"], id="B200"),
        pytest.param("10.3", NVCC_13, ["103"], id="one that the common set has not"),
        pytest.param("12.1", NVCC_13, ["121"], id="DGX Spark"),
        pytest.param("13.0", NVCC_13, ["121"], id="newer than nvcc"),
        pytest.param("12.0\n8.6", NVCC_12, ["86", "90a"], id="one newer than nvcc"),
        pytest.param("7.5\n8.6", NVCC_13, ["86"], id="one too old"),
    ],
)
def test_compiles_for_the_gpus_that_are_here(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    said: str,
    nvcc: tuple[int, ...],
    expected: list[str],
) -> None:
    smi(tmp_path, said)
    found = archs(build, monkeypatch, nvcc)
    assert found == expected
    # Each GPU runs machine code of its own generation, or has code made from PTX that is not newer than itself.
    ptx = min(int(word) for word in re.findall(r"code=compute_(\d+)", " ".join(build.arch_flags(found))))
    assert all(ptx <= int(gpu.replace(".", "")) for gpu in said.split() if gpu >= "8" or len(gpu) > 3)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        pytest.param(None, 0, id="no nvidia-smi"),
        pytest.param("No devices were found", 6, id="no devices"),
        pytest.param("NVIDIA-SMI has failed because it couldn't communicate with the driver.", 9, id="no driver"),
        pytest.param('Field "compute_cap" is not a valid field to query.', 2, id="old driver"),
        pytest.param("[N/A]", 0, id="not told"),
        pytest.param("", 0, id="silent"),
    ],
)  # fmt: skip
def test_without_a_gpu_it_is_left_out_and_the_command_named(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, status: int
) -> None:
    if said is not None:
        smi(tmp_path, said, status)
    with pytest.raises(build.NotAsked) as left_out:
        archs(build, monkeypatch, NVCC_13)
    assert str(left_out.value).startswith("no NVIDIA GPU was found to compile it for. ")
    assert "SMOLVLA_CUDA_ARCHS='80;90a' pip install ." in str(left_out.value)
    assert "`make cuda` in a checkout" in str(left_out.value)
    assert build.gpus_to_compile_for(asked=True) == [], "make cuda compiles for all then"


def test_an_older_gpu_is_a_reason(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi(tmp_path, "7.5\n6.1")
    with pytest.raises(
        build.NotAsked, match=r"it needs a GPU of compute capability 8\.0, here is 6\.1, 7\.5\."
    ):
        archs(build, monkeypatch, NVCC_13)


def test_an_older_nvcc_is_a_reason(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    smi(tmp_path, "9.0")
    with pytest.raises(build.Unavailable, match=r"this nvcc knows 35, 50, 70, 75, none of them for .* 9\.0"):
        archs(build, monkeypatch, NVCC_10)


@pytest.mark.parametrize("wish", ["80;90a", "none"])
def test_a_wish_is_heard_before_any_gpu_is_asked(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wish: str
) -> None:
    smi(tmp_path, "8.9")
    monkeypatch.setenv("SMOLVLA_CUDA_ARCHS", wish)
    monkeypatch.setattr(build, "gpus_to_compile_for", lambda asked: pytest.fail("asked"))
    (tmp_path / "nvcc").write_text("#!/bin/sh\nfor n in 80 90; do echo compute_$n; done\n")
    (tmp_path / "nvcc").chmod(0o755)
    with pytest.raises(
        build.Unavailable, match="no C\\+\\+ compiler|left out, as SMOLVLA_CUDA_ARCHS=none asks"
    ):
        build.compile_extension("cuda", [], tmp_path / "out.so", tmp_path)


@pytest.mark.parametrize(("wanted", "names"), [((), None), (["80", "90a"], ["80", "90a"])])
def test_make_cuda_and_a_checkout_that_has_it_compile_without_a_gpu(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, wanted: Any, names: list[str] | None
) -> None:
    """What setup.py hands on: every architecture for `make cuda`, those of the record where it was compiled before."""
    monkeypatch.setattr(build, "run", lambda *command: "".join(f"compute_{n}\n" for n in NVCC_13))
    assert build.cuda_archs("nvcc", [], wanted) == (names or build.CUDA_ARCHS)


LIBCUDA = """
int cuInit(unsigned flags) { return %(status)d; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 7 + ordinal; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? (device == 7 ? 8 : 12) : attribute == 76 ? (device == 7 ? 7 : 1) : 99;
    return 0;
}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes a shared library as Linux names it")
@pytest.mark.parametrize(("status", "expected"), [(0, [87, 121]), (100, [])], ids=["two", "no device"])
def test_the_driver_is_asked_where_there_is_no_nvidia_smi(
    tmp_path: Path, status: int, expected: list[int]
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=LIBCUDA % {"status": status}, text=True, check=True)
    code = "import ninja_build as b; print(b.smi_gpus(), b.driver_gpus())"
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "PATH": str(tmp_path),
        "PYTHONPATH": str(ROOT / "csrc"),
    }
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment)
    assert done.stdout.strip() == f"[] {expected}", done.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_an_installation_without_a_gpu_records_a_reason_and_no_failure(tmp_path: Path) -> None:
    """setup.py itself, with a compiler that says what it is asked for and makes nothing of the CPU part."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("__pycache__", "simt"))
    shutil.copy(ROOT / "setup.py", tree)
    (tree / "smolvla_fast").mkdir()
    environment = {**os.environ, "CXX": "/bin/false", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("SMOLVLA_CUDA_ARCHS", None)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    record = json.loads((tree / "smolvla_fast" / "_build.json").read_text())
    assert not record["cuda"]["built"] and not record["cpu"]["built"]
    assert record["cuda"]["reason"].startswith("no NVIDIA GPU was found to compile it for. ")
    lines = [line for line in done.stdout.splitlines() if "WARNING" in line or "is left out" in line]
    assert any("_cpu is left out, everything else works" in line for line in lines), "a failure is a warning"
    assert not any("_cuda" in line and "everything else works" in line for line in lines)
