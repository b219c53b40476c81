"""Compiles the CPU kernels with functions in the place of instructions, for emulated.py. Needs pybind11, not torch."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import ninja_build

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
HERE = platform.machine().lower() in ("x86_64", "amd64") and os.name == "posix"
"""Whether this is x86-64 on a POSIX system."""
SIMDE = """\
#if !__has_include(<simde/x86/avx512.h>)
#error no simde/x86/avx512.h
#endif
"""


@cache
def built() -> Path | str:
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
