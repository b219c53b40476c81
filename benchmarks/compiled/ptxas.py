"""`make ptxas`: every CUDA C++ kernel compiled for every architecture: registers, spills, instructions in its loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import networkx
import triton
from ninja_build import CUDA_ARCHS, CUDA_FLAGS, nvcc_compiler

from benchmarks import ROOT
from benchmarks.compiled.kernels import Kernel, Rows, parse_log
from benchmarks.report.tables import NONE

TARGETS = tuple(CUDA_ARCHS)
COUNTED = ("HMMA", "LDGSTS", "UBLKCP", "LDSM")
"""Products in tensor cores, copies in the background (by the thread, in bulk), matrices read from shared memory."""
EXPECTED: dict[str, tuple[str, ...]] = {
    "denoise_persistent": ("HMMA", "LDGSTS or UBLKCP"),
    "masked_attention": ("HMMA",),  # keys and values go from L2 straight into fragments, past shared memory
    "linear_residual": ("HMMA", "LDGSTS", "LDSM"),
    "norm_products": ("UBLKCP",),  # of K no loop is left: every step has constant offsets
    "euler_step": (),
    "image_prep": (),
}
"""What must stand in the loops of each kernel of a source: products in tensor cores, copies in the background."""
FIRST = {"linear_residual": 90, "norm_products": 90}
LAST = {"norm_products": 119}
"""Of sources that other architectures lack instructions for, or shared memory: beyond them kernels are empty, and never
launched."""
FENCED = ("denoise_persistent",)
"""Sources whose kernels may wait for all memory of the GPU. A release by a cluster's barrier is such a fence too."""
SPILLS: dict[str, tuple[int, str]] = {}
"""Bytes that a thread of a source's kernels may spill where 0 is not kept, each with the reason."""


def names() -> list[str]:
    """Every source of csrc/cuda that has a kernel for an op."""
    return [path.stem for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if path.stem != "device"]


def tasks(names: Sequence[str], targets: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, target) for name in names for target in targets]


def beyond(source: str, target: str, kernel: Kernel) -> list[str]:
    """What of EXPECTED a kernel has not in its loops, and fences that FENCED does not allow."""
    if source not in EXPECTED:
        return ["EXPECTED has no line for its source"]
    if "MEMBAR" in kernel.instructions and source not in FENCED:
        return ["a fence of all memory"]
    if not FIRST.get(source, 0) <= int(target.rstrip("af")) <= LAST.get(source, 999):
        return []
    wishes = (wish for wish in EXPECTED[source] if not kernel.instructions.keys() & set(wish.split(" or ")))
    return [f"no {wish} in its loops" for wish in wishes]


def about() -> str:
    return (
        f"# CUDA C++ kernels: registers, spills, instructions\n\nMade by `make ptxas` with {compiler_version()}, without a "
        "GPU. In the first table of a source a cell is registers a thread / bytes a thread spills, stored and loaded / "
        "bytes of stack / bytes of static shared memory (dynamic shared memory is asked for at launch and unknown here). "
        f"The second counts {', '.join(COUNTED)} in the loops of the machine code, unrolled as they stand: HMMA multiplies "
        "in tensor cores, LDGSTS and UBLKCP copy to shared memory in the background, LDSM is ldmatrix. MEMBAR of the GPU, "
        "counted in loops or not, is a fence of all its memory.\n\n"
        "No kernel spills unless its section says so. Below sm_90 linear_residual and norm_products are empty: "
        "they need clusters of blocks, or launches that begin early; norm_products is on 12.x too, for want of "
        "shared memory."
    )


TABLES = {
    "kernel": "{0.registers} / {0.spills} / {0.stack} / {0.shared}".format,
    "instructions": lambda k: ", ".join(f"{n} {name}" for name, n in k.instructions.items()) or NONE,
}


def say(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stdout.strip()[-2000:]}")
    return done.stdout


def disassembler() -> str:
    """The cuobjdump that Triton brings, or that TRITON_CUOBJDUMP_PATH names."""
    return triton.knobs.nvidia.cuobjdump.path


@cache
def compiler_version() -> str:
    """As the table names it: the release, and the build that fixes every bit of the code."""
    lines = say(nvcc_compiler(), "--version").strip().splitlines()
    release = re.search(r"release ([\d.]+)", "\n".join(lines))
    return f"nvcc {release[1] if release else '?'} ({lines[-1].removeprefix('Build ')})"


def readable(mangled: str) -> str:
    """``_ZN7smolvla4cuda...`` as ``euler_step_fwd_kernel<float, bf16, float>``, without namespaces and parameters."""
    name = say("c++filt", "--no-params", mangled).strip() if mangled.startswith("_Z") else mangled
    return re.sub(r"\(anonymous namespace\)::|\b[a-z_]+::", "", name)


def in_loops(code: str) -> dict[str, int]:
    """How often each of COUNTED stands where control can come back to it, in one kernel's disassembled code."""
    # /*0440*/ @!P0 BRA 0x120 ;    what is not predicated by @ may be by an operand: BRA.U UP0, 0x120
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?(\w+)([^;]*);"
    lines = re.findall(pattern, code, re.MULTILINE)
    place = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    found = (re.search(r"\b0x([0-9a-f]+)\s*(?:&.*|\?.*)?$", rest) for *_, rest in lines)
    targets = [at and place.get(int(at[1], 16)) for at in found]
    # Where the lanes that parted at BSSY go on from BSYNC.
    joins = [to for line, to in zip(lines, targets, strict=True) if line[2] == "BSSY" and to is not None]
    flow = networkx.DiGraph()
    for i, ((_, guard, word, rest), to) in enumerate(zip(lines, targets, strict=True)):
        ends = word in ("BRA", "EXIT", "RET") and not guard and not re.search(r"\bU?P\d", rest)
        after = [] if ends or i + 1 == len(lines) else [i + 1]
        after += [to] if word == "BRA" and to is not None else joins if word == "BSYNC" else []
        flow.add_edges_from((i, other) for other in after)
    # In a loop is what a path leads back to.
    circles = [c for c in networkx.strongly_connected_components(flow) if flow.subgraph(c).size()]
    counts = Counter(lines[i][2] for circle in circles for i in circle)
    return {word: counts[word] for word in COUNTED if counts[word]}


def fences(code: str) -> dict[str, int]:
    """How often a kernel waits for all memory of the GPU; a fence of the block, MEMBAR.ALL.CTA, is none."""
    found = len(re.findall(r"\bMEMBAR\.\w+\.(?:GPU|SYS)\b", code))
    return {"MEMBAR": found} if found else {}


def compile_task(task: tuple[str, str]) -> Rows:
    """Every kernel of a source, compiled for one architecture with the extension's own flags."""
    name, target = task
    with tempfile.TemporaryDirectory(prefix="smolvla-ptxas-") as folder:
        cubin = str(Path(folder, "code.cubin"))
        flags = (*CUDA_FLAGS, "-Icsrc", f"-arch=sm_{target}", "-cubin", "-Xptxas", "-v", "-o", cubin)
        log = say(nvcc_compiler(), *flags, f"csrc/cuda/{name}.cu")
        sass = say(disassembler(), "-sass", cubin)
    code = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    found: Rows = {}
    for mangled, kernel in parse_log(log).items():
        key = (name, f"`{readable(mangled)}`")
        if key in found or mangled not in code:
            raise RuntimeError(f"{name}: {key[1]} stands twice in ptxas's log, or not in the machine code")
        found[key] = {target: replace(kernel, instructions=in_loops(code[mangled]) | fences(code[mangled]))}
    return dict(sorted(found.items()))
