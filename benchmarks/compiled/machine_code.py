"""What ptxas says of each CUDA C++ kernel, and which instructions stand in its loops; no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ninja_build import CUDA_ARCHS, CUDA_FLAGS, cuda_homes, nvcc_compiler

ROOT = Path(__file__).resolve().parents[2]
ARCHS = tuple(CUDA_ARCHS)
COUNTED = ("HMMA", "LDGSTS", "UBLKCP", "LDSM")
"""Products in tensor cores, copies in the background (by the thread, in bulk), matrices read from shared memory."""

Key = tuple[str, str]
"""source file without its suffix, kernel with its template arguments"""


@dataclass(frozen=True)
class Kernel:
    """One kernel in one architecture's code. spills: bytes stored and loaded by a thread; shared: static, of a block;
    instructions: how often each of COUNTED stands in a loop."""

    registers: int
    spills: int
    stack: int
    shared: int
    instructions: dict[str, int] = field(default_factory=dict)

    def resources(self) -> str:
        return f"{self.registers} / {self.spills} / {self.stack} / {self.shared}"

    def counts(self) -> str:
        return ", ".join(f"{n} {name}" for name, n in self.instructions.items()) or "–"


def say(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stdout.strip()[-2000:]}")
    return done.stdout


@cache
def disassembler() -> str:
    """cuobjdump from the PATH, a CUDA toolkit, or Triton's package, which brings one."""
    folders = [Path(home, "bin") for home in cuda_homes()]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    if not found:
        raise RuntimeError(f"no cuobjdump on PATH nor in {', '.join(map(str, folders))}: install triton")
    return found


@cache
def compiler_version() -> str:
    """As the table names it: the release, and the build that fixes every bit of the code."""
    lines = say(nvcc_compiler(), "--version").strip().splitlines()
    release = re.search(r"release ([\d.]+)", "\n".join(lines))
    return f"nvcc {release[1] if release else '?'} ({lines[-1].removeprefix('Build ')})"


def sources() -> list[Path]:
    """Every source of csrc/cuda that has a kernel for an op: a launcher of the file's own name."""
    return [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if path.stem != "device"]


def readable(mangled: str) -> str:
    """``_ZN7smolvla4cuda...`` as ``euler_step_fwd_kernel<float, bf16, float>``, without namespaces and parameters."""
    name = say("c++filt", mangled).strip() if mangled.startswith("_Z") else mangled
    depth = 0
    for place, sign in enumerate(name):
        depth += (sign == "<") - (sign == ">")
        # The parameters' bracket, which the one of "(anonymous namespace)" is not.
        if sign == "(" and not depth and not name.startswith("(anonymous namespace)", place):
            name = name[:place]
            break
    return re.sub(r"\(anonymous namespace\)::|\b[a-z_]+::", "", name.removeprefix("void ")).strip()


def parse_log(log: str) -> dict[str, Kernel]:
    """By mangled name, what ``-Xptxas -v`` says of each kernel."""
    found = {}
    for text in log.split("Compiling entry function '")[1:]:
        # Functions that were not inlined have their own properties; a kernel's come first.
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        used = re.search(r"Used (\d+) registers", text)
        if frame is None or used is None:
            raise RuntimeError(f"ptxas says nothing of a kernel; its log:\n{text[:1000]}")
        shared = re.search(r"(\d+) bytes smem", text)
        found[text.split("'", 1)[0]] = Kernel(
            int(used[1]),
            int(frame[2]) + int(frame[3]),
            int(frame[1]),
            int(shared[1]) if shared else 0,
        )
    return found


def in_loops(code: str) -> dict[str, int]:
    """How often each of COUNTED stands where control can come back to it, in one kernel's disassembled code."""
    # /*0440*/ @!P0 BRA 0x120 ;    what is not predicated by @ may be by an operand: BRA.U UP0, 0x120
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?(\w+)([^;]*);"
    lines = [
        (int(a, 16), guard, word, rest) for a, guard, word, rest in re.findall(pattern, code, re.MULTILINE)
    ]
    place = {address: i for i, (address, *_) in enumerate(lines)}
    target = [re.search(r"\b0x([0-9a-f]+)\s*(?:&.*|\?.*)?$", rest) for *_, rest in lines]
    joins = [  # where the lanes that parted at BSSY go on from BSYNC
        place[int(at[1], 16)]
        for (*_, word, _), at in zip(lines, target, strict=True)
        if word == "BSSY" and at and int(at[1], 16) in place
    ]
    after: list[list[int]] = []
    for i, ((_, guard, word, rest), at) in enumerate(zip(lines, target, strict=True)):
        ends = word in ("BRA", "EXIT", "RET") and not guard and not re.search(r"\bU?P\d", rest)
        to = [] if ends or i + 1 == len(lines) else [i + 1]
        if word == "BRA" and at:
            to.append(place[int(at[1], 16)])
        after.append(to + (joins if word == "BSYNC" else []))
    return _count(lines, after)


def _count(lines: list[tuple[int, str, str, str]], after: list[list[int]]) -> dict[str, int]:
    """An instruction is in a loop where a path from one of its successors leads back to it."""
    before: list[list[int]] = [[] for _ in lines]
    for i, to in enumerate(after):
        for j in to:
            before[j].append(i)
    found: Counter[str] = Counter()
    component: dict[int, int] = {}
    for i in range(len(lines)):
        if i not in component:
            circle = _reach(i, after) & _reach(i, before)
            component.update(dict.fromkeys(circle or {i}, len(circle)))
        if component[i] and lines[i][2] in COUNTED:
            found[lines[i][2]] += 1
    return {word: found[word] for word in COUNTED if found[word]}


def _reach(start: int, edges: list[list[int]]) -> set[int]:
    """What at least one step leads to."""
    seen: set[int] = set()
    todo = list(edges[start])
    while todo:
        i = todo.pop()
        if i not in seen:
            seen.add(i)
            todo += edges[i]
    return seen


def compile_source(source: Path, arch: str) -> dict[Key, Kernel]:
    """Every kernel of a source, compiled for one architecture with the extension's own flags."""
    with tempfile.TemporaryDirectory(prefix="smolvla-ptxas-") as folder:
        cubin = str(Path(folder, "code.cubin"))
        flags = (*CUDA_FLAGS, "-Icsrc", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-o", cubin)
        log = say(nvcc_compiler(), *flags, source.relative_to(ROOT).as_posix())
        sass = say(disassembler(), "-sass", cubin)
    code = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    found: dict[Key, Kernel] = {}
    for mangled, kernel in parse_log(log).items():
        key = (source.stem, readable(mangled))
        if key in found or mangled not in code:
            raise RuntimeError(
                f"{source.name}: {key[1]} stands twice in ptxas's log, or not in the machine code"
            )
        found[key] = Kernel(
            kernel.registers, kernel.spills, kernel.stack, kernel.shared, in_loops(code[mangled])
        )
    return dict(sorted(found.items()))
