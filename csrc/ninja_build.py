"""How the extensions are compiled: compilers, flags and a ninja file. setup.py says what is compiled.

Environment: CXX, the C++ compiler; SMOLVLA_CUDA_ARCHS, e.g. "90a;120", or "none" to leave the CUDA part out. Without it the
CUDA part is compiled for the NVIDIA GPUs that are here.
"""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CUDA_ARCHS = ["80", "86", "87", "89", "90a", "100a", "120"]
MIN_CAPABILITY = 80
"""The first whose tensor cores multiply bf16, as in smolvla_fast/ops/availability.py."""

# No -march: one binary serves every x86-64, and a function that needs more carries its own target attribute.
# No contraction into fma: whether a compiler finds one must not decide the bits of a result.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Unless told that none traps, GCC makes no vectors of a loop with a condition.
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
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


class NotAsked(Unavailable):
    """Nobody asked for it: no compiler failed, and nothing is missing."""


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
    """["-fopenmp"] where the compiler has OpenMP; without it the kernels make threads of their own."""
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
    """Where nvcc is looked for after the PATH, best first: as in smolvla_fast/measure/system.py, for `doctor`."""
    return [
        home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if home
    ]


def wished_archs():
    """The words of SMOLVLA_CUDA_ARCHS; none where it is not set or empty."""
    return [word for word in re.split(r"[\s;,]+", os.environ.get("SMOLVLA_CUDA_ARCHS", "")) if word]


def nvcc_compiler():
    programs = (Path(home, "bin", "nvcc") for home in cuda_homes())
    found = shutil.which("nvcc") or next((str(path) for path in programs if path.exists()), None)
    if wished_archs() == ["none"]:
        raise NotAsked("left out, as SMOLVLA_CUDA_ARCHS=none asks")
    if not found:
        raise Unavailable(
            "no nvcc on PATH, in $CUDA_HOME, $CUDA_PATH or /usr/local/cuda: install the CUDA toolkit"
        )
    return found


def cuda_archs(nvcc, gpus=(), without_gpu=()):
    """What to compile for: the wish as it stands; without one what the GPUs run, given as 90 for capability 9.0; without
    either ``without_gpu``, or the common set, as far as this nvcc knows it."""
    known = re.findall(r"compute_(\d+)", run(nvcc, "--list-gpu-arch"))
    wish = wished_archs()
    # Asked here, for nvcc's own words say nothing of the variable: 9.0 is how torch writes it, sm_90 how nvcc does.
    wrong = [word for word in wish if re.sub(r"(?<=\d)[af]$", "", word) not in known]
    if wrong:
        raise Unavailable(
            f"SMOLVLA_CUDA_ARCHS={os.environ['SMOLVLA_CUDA_ARCHS']!r} asks for {', '.join(wrong)}; accepted are "
            f"architectures of this nvcc as in 80;90a, which knows {', '.join(known)}, or none"
        )
    if wish or not gpus:
        return wish or [arch for arch in without_gpu or CUDA_ARCHS if arch.rstrip("af") in known]
    # The newest at or below each GPU: where nvcc does not know the GPU itself, the driver makes its code from PTX.
    below = [
        max((int(arch) for arch in known if MIN_CAPABILITY <= int(arch) <= gpu), default=None) for gpu in gpus
    ]
    if not any(below):
        raise Unavailable(
            f"this nvcc knows {', '.join(known)}, none of them for a GPU of compute capability "
            f"{', '.join(map(dotted, gpus))}: install a CUDA toolkit that does"
        )
    common = {int(re.sub(r"\D", "", arch)): arch for arch in CUDA_ARCHS}
    return list(dict.fromkeys(common.get(arch, str(arch)) for arch in below if arch))


def gpus_to_compile_for(asked):
    """The GPUs here that the kernels run on, as ``cuda_archs`` takes them. Without any: [] where the CUDA part was asked
    for, else raises NotAsked."""
    found = sorted(set(smi_gpus() or driver_gpus()))
    gpus = [gpu for gpu in found if gpu >= MIN_CAPABILITY]
    if gpus or asked:
        return gpus
    here = "no NVIDIA GPU was found to compile it for"
    if found:
        here = f"it needs a GPU of compute capability {dotted(MIN_CAPABILITY)}, here is {', '.join(map(dotted, found))}"
    raise NotAsked(
        f"{here}. For another machine's GPU, say 8.0 and 9.0: `SMOLVLA_CUDA_ARCHS='80;90a' pip install .`; for "
        f"{', '.join(CUDA_ARCHS)}: `make cuda` in a checkout"
    )


def dotted(capability):
    return f"{capability // 10}.{capability % 10}"


def smi_gpus():
    """[90] for one of capability 9.0, as nvidia-smi tells, of a GPU cut into MIG instances too; [] where it does not."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [10 * int(major) + int(minor) for major, minor in re.findall(r"(?m)^ *(\d+)\.(\d) *$", said)]


def driver_gpus():
    """The same, as the driver tells: containers, Jetson and WSL may have it without nvidia-smi."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        capability = 0
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            driver.cuDeviceGet(ctypes.byref(device), index)
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability = 10 * capability + value.value
        found.append(capability)
    return found


def arch_flags(archs):
    """Machine code for each, and PTX of the lowest, from which a driver makes code for any GPU above it."""
    lowest = min((re.sub(r"\D", "", arch) for arch in archs), key=int)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*codes, f"-gencode=arch=compute_{lowest},code=compute_{lowest}"]


def compile_extension(kind, sources, target, work, without_gpu=(), flags=()):
    """Compiles "cpu" or "cuda" into the file `target`, objects under `work`; returns the facts to record.

    without_gpu  what to compile "cuda" for where there is no GPU and SMOLVLA_CUDA_ARCHS names none; () leaves it out
    flags        more of them, for the C++ compiler
    raises       NotAsked, Unavailable with the reason
    """
    import pybind11

    nvcc, archs = "", []
    if kind == "cuda":
        gpus = [] if wished_archs() else gpus_to_compile_for(bool(without_gpu))
        nvcc = nvcc_compiler()
        archs = cuda_archs(nvcc, gpus, without_gpu)
    cxx = cxx_compiler()
    openmp = openmp_flags(cxx) if kind == "cpu" else []
    csrc = f"-I{os.path.relpath(Path(__file__).parent)}"  # objects of another checkout have the same
    include = [csrc, *(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))]
    flags = {".cpp": [*CXX_FLAGS, *openmp, *include, *flags]}
    linker, link_flags = (
        cxx,
        [*(openmp or ["-pthread"]), *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])],
    )
    facts = {"compiler": run(*cxx, "--version").splitlines()[0], "openmp": bool(openmp)}
    if kind == "cuda":
        host = ["-ccbin", cxx[0], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags[".cu"] = [*CUDA_FLAGS, "--threads=2", *arch_flags(archs), *host, csrc]
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
