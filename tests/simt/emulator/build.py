"""Compiles kernels for the host emulator, for tests: csrc/cuda/*.cu as C++ with every access instrumented.

GCC's -fsanitize=thread calls a function before each load and store; tsan.cpp has these functions, and GCC's own
runtime for them is not linked. The emulator and the bindings are compiled without it and linked first, so that inline
functions which both sides compile come out of the emulator's side.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parents[2]
CSRC = ROOT / "csrc"
INCLUDES = [f"-I{path}" for path in (CSRC, EMULATOR.parent, EMULATOR / "include")]
LIBRARY = "_simt"
"""The name that the bindings of csrc give their module here."""
WORK = ROOT / "build" / "simt" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"

FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-DSMOLVLA_SIMT"]
# No vectorizer and no merged stores: an access keeps the size that the source gives it, and with it its alignment.
KERNEL_FLAGS = ["-O2", "-g1", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fno-store-merging"]
KERNEL_FLAGS += ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
# Not expanded in place, where they would not be instrumented, and every call returns to the line that made it.
KERNEL_FLAGS += [f"-fno-builtin-{name}" for name in ("memcpy", "memmove", "memset")]
KERNEL_FLAGS += ["-fno-optimize-sibling-calls"]
HOST_FLAGS = ["-O2"]
MATRIX_FLAGS = ["-O3"]

RULES = """
rule host
  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out
  description = $out
  depfile = $out.d
  deps = gcc
rule kernel
  command = {cxx} $flags -MMD -MF $out.d -x c++ -c $in -o $out.whole && {objcopy} {renamed} $out.whole $out
  description = $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared $in -o $out -ldl
  description = $out
"""


class Unavailable(Exception):
    """The emulator cannot be built here; the message says why."""


def tools() -> dict[str, str]:
    """The programs of a build. Raises Unavailable."""
    if not sys.platform.startswith("linux"):
        raise Unavailable("the SIMT emulator runs on Linux")
    asked = os.environ.get("CXX", "")
    cxx = asked if "g++" in asked else "g++"
    wanted = {"cxx": cxx, "objcopy": "objcopy", "ninja": "ninja"}
    beside = Path(sys.executable).parent  # ninja comes as a Python package as well
    for program in (shlex.split(cxx)[0], "objcopy"):
        if not shutil.which(program):
            raise Unavailable(f"no {program}: install g++ and binutils")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(beside))
    if not ninja:
        raise Unavailable("no ninja: pip install ninja")
    return {**wanted, "ninja": ninja}


def python_includes() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise Unavailable("no pybind11: pip install pybind11") from error
    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def ninja_text(name: str, kernels: Sequence[Path], bindings: Sequence[Path], cxx: str, objcopy: str) -> str:
    quoted = shlex.join
    # memcpy is not instrumented by the compiler: a kernel's calls go to the checked one.
    renamed = quoted(
        [f"--redefine-sym={name}=smolvla_simt_{name}" for name in ("memcpy", "memmove", "memset")]
    )
    lines = [RULES.format(cxx=cxx, objcopy=objcopy, renamed=renamed)]
    objects = []

    def build(rule: str, source: Path, flags: Sequence[str]) -> None:
        # Libraries share what they do not have switched.
        shared = {EMULATOR: "emulator", CSRC: "bindings", CSRC / "cuda": "kernels"}
        folder = WORK / shared.get(source.parent, name)
        target = folder / f"{source.stem}.{rule}.o"
        objects.append(str(target))
        lines.append(f"build {target}: {rule} {source}\n  flags = {quoted([*FLAGS, *flags, *INCLUDES])}")

    for source in sorted(EMULATOR.glob("*.cpp")):
        build(
            "host",
            source,
            [*(MATRIX_FLAGS if source.stem == "numbers" else HOST_FLAGS), *system(python_includes())],
        )
    for source in bindings:
        level = ["-O1"] if source.stem.startswith("bindings") else ["-O2"]
        # Its tables name functions by lambdas.
        standard = ["-std=c++20"] if source.parent.name == "ptx" else []
        build("host", source, [*level, *standard, f"-DSMOLVLA_MODULE={LIBRARY}", *system(python_includes())])
    for source in kernels:
        build("kernel", source, KERNEL_FLAGS)
    lines.append(f"build {WORK / name}.so: link {' '.join(objects)}\n")
    return "\n".join(lines)


def system(includes: Sequence[str]) -> list[str]:
    """As system headers, in which warnings are not ours."""
    return [word for include in includes for word in ("-isystem", include.removeprefix("-I"))]


def load(name: str, kernels: Sequence[Path], bindings: Sequence[Path], module: str = "") -> ModuleType:
    """The module of these sources, compiled where it is not up to date. Raises Unavailable, or RuntimeError with the
    compiler's words.

    name  of the file    module  what its bindings call it, where that is another name
    """
    found = tools()
    WORK.mkdir(parents=True, exist_ok=True)
    # Two test runs at once share the objects: one builds, the other waits, and each loads before the next may link.
    with (WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        script = WORK / f"{name}.ninja"
        text = ninja_text(name, kernels, bindings, found["cxx"], found["objcopy"])
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        command = [found["ninja"], "-C", str(WORK), "-f", str(script), "-j", "2"]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"kernels do not compile for the emulator:\n{done.stdout[-6000:]}")
        # Python asks the file for what the last part names; pybind11 would give one full name one module.
        spec = importlib.util.spec_from_file_location(f"{name}.{module or name}", WORK / f"{name}.so")
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return loaded


@cache
def ptx() -> ModuleType:
    """The machine that runs PTX, for what Triton's compiler emits."""
    folder = EMULATOR.parent / "ptx"
    return load("_ptx", [], sorted(folder.glob("*.cpp")))


def library() -> ModuleType:
    """All kernels of csrc/cuda with their bindings, as smolvla_fast._cuda has them, plus the emulator's own functions."""
    return _library(LIBRARY, {})


def switched(name: str, text: str) -> ModuleType:
    """The same with another text of csrc/cuda/<name>.cu, beside what ``library`` gives."""
    source = WORK / "switched" / f"{name}.cu"
    source.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    return _library(f"{LIBRARY}_switched_{name}", {name: source})


def _library(name: str, others: dict[str, Path]) -> ModuleType:
    kernels = [others.get(path.stem, path) for path in sorted((CSRC / "cuda").glob("*.cu"))]
    return load(name, kernels, [CSRC / "bindings_cuda.cpp"], LIBRARY)
