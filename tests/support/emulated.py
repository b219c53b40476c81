"""The CPU kernels at levels that this processor lacks: the same sources, with functions in the place of its instructions.

SIMDe has most of the functions, emulated.h the others. What is computed is what the processor would compute. This does not
test which level is chosen, what the compiler makes of it, or ops whose levels differ by the compiler's target alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import ninja_build
import pytest

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import int8_attention

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
HERE = platform.machine().lower() in ("x86_64", "amd64") and os.name == "posix"
"""Whether this is x86-64 on a POSIX system."""
SIMDE = """\
#if !__has_include(<simde/x86/avx512.h>)
#error no simde/x86/avx512.h
#endif
"""


def library() -> Path:
    """Path of the emulated extension; skips the test where it cannot be built."""
    found = _built() if HERE else "it is built on x86-64, not under Windows"
    return found if isinstance(found, Path) else pytest.skip(found)


@cache
def _built() -> Path | str:
    """Its path, or why it cannot be built."""
    import fcntl

    work = ROOT / "build" / "emulated"
    target = work / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    kernels = [path for path in sorted(ROOT.glob("csrc/cpu/*.cpp")) if path.name != "integer_level.cpp"]
    sources = [SUPPORT / "emulated.cpp", ROOT / "csrc" / "bindings.cpp", *kernels]
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            cxx = ninja_build.cxx_compiler()
            ninja_build.run(*cxx, "-x", "c++", "-fsyntax-only", "-", stdin=SIMDE)
            macros = ninja_build.run(*cxx, "-march=native", "-dM", "-E", "-x", "c++", "-", stdin="")
        except ninja_build.Unavailable as error:
            return f"no SIMDe for what this processor lacks (Debian: libsimde-dev): {str(error)[-200:]}"
        # SIMDe makes its functions of 256-bit instructions where it may; without FMA it rounds each product.
        wide = ["-mavx2", "-mfma"] if "__AVX2__" in macros and "__FMA__" in macros else []
        flags = ["-O1", "-Wno-psabi", *wide]
        # SIMDe is long: read once, not by each of the sources.
        header = work / "emulated.h"
        read = header.with_suffix(".h.gch")
        if not read.exists() or read.stat().st_mtime < (SUPPORT / "emulated.h").stat().st_mtime:
            shutil.copy(SUPPORT / "emulated.h", header)
            common = [*ninja_build.CXX_FLAGS, *ninja_build.openmp_flags(cxx), *flags]
            ninja_build.run(*cxx, *common, "-x", "c++-header", str(header), "-o", str(read))
        flags += ["-include", str(header)]
        ninja_build.compile_extension("cpu", sources, target, work, flags=flags)
    return target


@cache
def _module() -> ModuleType:
    # By another name than the extension's: pybind11 would give what is loaded under it.
    spec = importlib.util.spec_from_file_location("emulated._cpu", library())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def instead() -> Iterator[None]:
    """Inside, it is the CPU extension."""
    module, load = _module(), extension._load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "_load", lambda kind: (module, "") if kind == "cpu" else load(kind))
        yield


@contextmanager
def integers_at(level: str) -> Iterator[None]:
    """Inside, kernels of integers run at this one of ``int8_attention.LEVELS``, emulated where another is in use here."""
    if level == int8_attention.level():
        yield
        return
    with instead():
        chosen = ctypes.CDLL(str(library()))
        chosen.set_integer_level(int8_attention.LEVELS.index(level))
        try:
            yield
        finally:
            chosen.set_integer_level(0)
