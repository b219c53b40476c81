"""What is shipped, what an import costs, and that an installation never depends on a compiler."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {path.name for path in (ROOT / "kernels").glob("*.py")}
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in (".cpp", ".cu", ".h", ".cuh")
}
MODULES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "smolvla_fast").rglob("*.py")}


def files_under(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_kernels_folder_is_no_package_by_itself():
    assert KERNELS, "no Triton kernel to ship"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package of that name on PyPI"


def test_sdist_holds_what_is_built(source_tree):
    files = files_under(source_tree)
    assert {f"kernels/{name}" for name in KERNELS} <= files
    assert files >= SOURCES | {"csrc/ninja_build.py", "setup.py", "pyproject.toml", "LICENSE"}
    # The pointer is for checkouts alone: in a wheel the kernels themselves take its place.
    assert MODULES - files == {"smolvla_fast/kernels/__init__.py"}


def test_installation_from_the_sdist_holds_every_kernel_and_source(installed):
    files = files_under(installed)
    assert {f"smolvla_fast/kernels/{name}" for name in KERNELS} <= files
    assert {f"smolvla_fast/{name}" for name in SOURCES} <= files
    assert MODULES - files == {"smolvla_fast/kernels/__init__.py"}
    top = {path.name for path in installed.iterdir() if ".dist-info" not in path.name}
    assert top - {"bin"} == {"smolvla_fast"}, (
        "nothing but the package may land beside other people's packages"
    )


def test_plans_travel(source_tree, tmp_path):
    """A file in smolvla_fast/plans, where there need be none, from a checkout into the sdist, and from that into a wheel."""
    checkout, sdist = tmp_path / "checkout", tmp_path / "sdist"
    shutil.copytree(source_tree, checkout, ignore=shutil.ignore_patterns("build"))
    (checkout / "smolvla_fast" / "plans").mkdir(exist_ok=True)
    name = "smolvla_fast/plans/some-gpu-bf16-0123456789abcdef.json"
    (checkout / name).write_text("{}")
    build = "from setuptools import build_meta; build_meta.build_{0}('..')"
    # No compiler: what is shipped is the same without.
    environment = {**os.environ, "PATH": "", "CXX": "", "SMOLVLA_CUDA_ARCHS": "none"}
    command = [sys.executable, "-c"]
    subprocess.run([*command, build.format("sdist")], cwd=checkout, check=True, capture_output=True)
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), sdist, filter="data")
    tree = next(sdist.iterdir())
    assert (tree / name).read_text() == "{}"
    subprocess.run(
        [*command, build.format("wheel")], cwd=tree, check=True, capture_output=True, env=environment
    )
    with zipfile.ZipFile(next(sdist.glob("*.whl"))) as wheel:
        assert wheel.read(name) == b"{}"


def test_installed_kernels_are_imported_from_the_package(installed, python):
    pytest.importorskip("triton")
    code = "import smolvla_fast.kernels.layer_norm as k; print(k.__file__)"
    assert python(code, [installed]) == str(installed / "smolvla_fast" / "kernels" / "layer_norm.py")


def test_the_wheel_carries_its_metadata(installed):
    text = next(installed.glob("smolvla_fast-*.dist-info/METADATA")).read_text()
    fields = [line.split(": ", 1) for line in text.split("\n\n", 1)[0].splitlines() if ": " in line]
    assert ["Requires-Python", ">=3.10"] in fields
    assert ["License-Expression", "Apache-2.0"] in fields
    needed = {
        value.split(";")[0].strip()
        for key, value in fields
        if key == "Requires-Dist" and "extra" not in value
    }
    assert {requirement.split(">")[0] for requirement in needed} == {
        "torch",
        "numpy",
        "safetensors",
        "transformers",
        "platformdirs",
    }
    extras = {value for key, value in fields if key == "Provides-Extra"}
    assert extras >= {"lerobot", "train", "bench", "test", "cli"}
    entry = next(installed.glob("smolvla_fast-*.dist-info/entry_points.txt")).read_text()
    assert "smolvla-fast = smolvla_fast.cli:main" in entry


@pytest.mark.parametrize(
    "environment, reason",
    [
        pytest.param(
            {"CC": "/bin/false", "CXX": "/bin/false"}, "/bin/false does not compile C++",
            marks=pytest.mark.long, id="failing",
        ),
        pytest.param({"PATH": "", "CXX": ""}, "no C++ compiler", id="missing"),
    ],
)  # fmt: skip
def test_without_a_compiler_it_installs_and_says_why(install_again, python, environment, reason):
    folder = install_again(**environment)
    record = json.loads((folder / "smolvla_fast" / "_build.json").read_text())
    assert record["cpu"]["built"] is False
    assert reason in record["cpu"]["reason"]
    assert not list(folder.glob("smolvla_fast/*.so"))
    code = """
import torch, smolvla_fast
from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import kernels as cpu
assert not extension.available("cpu")
try:
    cpu.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)
except extension.ExtensionUnavailable as error:
    print(error)
"""
    assert reason in python(code, [folder])


def test_kernels_are_found_when_nothing_is_installed_and_another_package_of_that_name_is(python, tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    code = """
import sys
# an editable installation would find the kernels by itself
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import smolvla_fast.kernels.tuning as tuning
import kernels
assert kernels.whose == "theirs"
print(tuning.__file__)
"""
    assert os.path.samefile(python(code, [ROOT, tmp_path]), ROOT / "kernels" / "tuning.py")
