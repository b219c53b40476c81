"""How the extensions are compiled: compilers, flags and a ninja file. setup.py says what is compiled.

Environment: CXX, the C++ compiler; SMOLVLA_CUDA_ARCHS, e.g. "90a;120", or "none" to leave the CUDA part out.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CUDA_ARCHS = ["80", "86", "87", "89", "90a", "100a", "120"]

# No -march: one binary serves every x86-64, and a function that needs more carries its own target attribute.
# No contraction into fma: whether a compiler finds one must not decide the bits of a result.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fopenmp-simd"]
CUDA_FLAGS = ["-std=c++17", "-O3"]

RULES = """
rule cpp
  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cu
  command = {nvcc} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $linker -shared $in -o $out $flags
"""


class Unavailable(Exception):
    """An extension cannot be compiled here; the message says why, and what would change that."""


def run(*command, stdin=None):
    try:
        done = subprocess.run(
            command, text=True, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run: {error.strerror}") from error
    if done.returncode:
        said = done.stdout.strip()[-2000:] or "it said nothing"
        raise Unavailable(f"{Path(command[0]).name} failed: {said}")
    return done.stdout


def cxx_compiler():
    """The C++ compiler as a list of words: $CXX, else the first of c++, g++, clang++ that exists."""
    found = (
        shlex.split(os.environ.get("CXX", ""))
        or [p for p in map(shutil.which, ("c++", "g++", "clang++")) if p][:1]
    )
    if not found:
        raise Unavailable(
            "no C++ compiler: install g++ (or clang++, or set CXX) and install smolvla_fast again"
        )
    try:
        run(*found, "-x", "c++", "-c", "-", "-o", os.devnull, stdin="int works;\n")
    except Unavailable as error:
        raise Unavailable(f"{shlex.join(found)} does not compile C++ ({error}); set CXX") from error
    return found


def openmp_flags(cxx):
    """["-fopenmp"] where the compiler has OpenMP; without it every op runs on one thread."""
    try:
        run(
            *cxx,
            "-fopenmp",
            "-shared",
            "-fPIC",
            "-x",
            "c++",
            "-",
            "-o",
            os.devnull,
            stdin="#include <omp.h>\n",
        )
    except Unavailable:
        return []
    return ["-fopenmp"]


def cuda_homes():
    """Where nvcc is looked for after the PATH, best first: as in smolvla_fast/cli/system.py, for `doctor`."""
    return [
        home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if home
    ]


def nvcc_compiler():
    programs = (Path(home, "bin", "nvcc") for home in cuda_homes())
    found = shutil.which("nvcc") or next((str(path) for path in programs if path.exists()), None)
    if os.environ.get("SMOLVLA_CUDA_ARCHS") == "none":
        raise Unavailable("left out, as SMOLVLA_CUDA_ARCHS=none asks")
    if not found:
        raise Unavailable(
            "no nvcc on PATH, in $CUDA_HOME, $CUDA_PATH or /usr/local/cuda: install the CUDA toolkit"
        )
    return found


def cuda_archs(nvcc):
    """What to compile for: the wish as it stands, else the common set as far as this nvcc knows it."""
    known = re.findall(r"compute_(\d+)", run(nvcc, "--list-gpu-arch"))
    given = os.environ.get("SMOLVLA_CUDA_ARCHS", "")
    wish = [word for word in re.split(r"[\s;,]+", given) if word]
    # Asked here, for nvcc's own words say nothing of the variable: 9.0 is how torch writes it, sm_90 how nvcc does.
    wrong = [word for word in wish if re.sub(r"(?<=\d)[af]$", "", word) not in known]
    if wrong:
        raise Unavailable(
            f"SMOLVLA_CUDA_ARCHS={given!r} asks for {', '.join(wrong)}; accepted are architectures of this nvcc as in "
            f"80;90a, which knows {', '.join(known)}, or none"
        )
    return wish or [arch for arch in CUDA_ARCHS if arch.rstrip("a") in known]


def arch_flags(archs):
    """Machine code for each, and PTX of the lowest, from which a driver makes code for any GPU above it."""
    lowest = min((re.sub(r"\D", "", arch) for arch in archs), key=int)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*codes, f"-gencode=arch=compute_{lowest},code=compute_{lowest}"]


def compile_extension(kind, sources, target, work):
    """Compiles "cpu" or "cuda" into the file `target`, objects under `work`; returns the facts to record."""
    import pybind11

    nvcc = nvcc_compiler() if kind == "cuda" else ""
    cxx = cxx_compiler()
    openmp = openmp_flags(cxx) if kind == "cpu" else []
    include = [f"-I{path}" for path in ("csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    flags = {".cpp": [*CXX_FLAGS, *openmp, *include]}
    linker, link_flags = (
        cxx,
        [*openmp, *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])],
    )
    facts = {"compiler": run(*cxx, "--version").splitlines()[0], "openmp": bool(openmp)}
    if kind == "cuda":
        archs = cuda_archs(nvcc)
        host = ["-ccbin", cxx[0], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags[".cu"] = [*CUDA_FLAGS, "--threads=2", *arch_flags(archs), *host, "-Icsrc"]
        # The static runtime looks for the driver when first called, so the module loads where there is none.
        linker, link_flags = [nvcc], ["-cudart=static", *host]
        facts = {"compiler": run(nvcc, "--version").strip().splitlines()[-1], "archs": archs}

    def words(items):
        return shlex.join(items).replace("$", "$$")

    def path(item):
        return re.sub(r"([$ :])", r"$\1", str(item))

    objects = [work / f"{Path(source).name}.o" for source in sources]
    text = f"builddir = {path(work)}\n" + RULES.format(cxx=words(cxx), nvcc=words([nvcc]))
    for source, obj in zip(sources, objects, strict=True):
        suffix = Path(source).suffix
        text += f"build {path(obj)}: {suffix[1:]} {path(source)}\n  flags = {words(flags[suffix])}\n"
    text += f"build {path(target)}: link {' '.join(map(path, objects))}\n"
    text += f"  linker = {words(linker)}\n  flags = {words(link_flags)}\n"
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(text)
    run(ninja_program(), "-f", str(work / "build.ninja"))
    return facts


def ninja_program():
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja") or "ninja"
    return str(Path(BIN_DIR, "ninja"))
