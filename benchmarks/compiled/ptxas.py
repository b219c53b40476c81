"""`make ptxas`: every CUDA C++ kernel compiled for every architecture, with no GPU: registers, spills, instructions.

Writes benchmarks/results/ptxas.md from `-Xptxas -v` and the disassembled code. Exits with 1 where a hot kernel spills or
lacks the instructions that it is built on. Nothing in the file depends on the day or the machine, so what a fresh run
writes is compared with what is committed (tests/bench/test_ptxas.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.compiled.machine_code import (
    ARCHS,
    COUNTED,
    ROOT,
    Kernel,
    Key,
    compile_source,
    compiler_version,
    sources,
)

Rows = dict[Key, dict[str, Kernel]]

BACKGROUND = "LDGSTS or UBLKCP"
EXPECTED: dict[str, tuple[str, ...]] = {
    "denoise_persistent": ("HMMA", BACKGROUND),
    "masked_attention": ("HMMA",),  # keys and values go from L2 straight into fragments, past shared memory
    "euler_step": (),
    "image_prep": (),
}
"""What must stand in the loops of each kernel of a source: products in tensor cores, copies in the background."""
SPILLS: dict[str, tuple[int, str]] = {}
"""Bytes that a thread of a source's kernels may spill where 0 is not kept, each with the reason."""


def missing(key: Key, kernel: Kernel) -> list[str]:
    """What of EXPECTED does not stand in a kernel's loops."""
    return [
        wish
        for wish in EXPECTED.get(key[0], ())
        if not any(w in kernel.instructions for w in wish.split(" or "))
    ]


def red(rows: Rows) -> list[str]:
    """A line for each cell that passes a limit."""
    found = [
        f"{source}: EXPECTED has no line for it" for source in {key[0] for key in rows} - EXPECTED.keys()
    ]
    for key, cells in rows.items():
        for arch, kernel in cells.items():
            where = f"{key[1]}, sm_{arch}"
            bound = SPILLS.get(key[0], (0, ""))[0]
            if kernel.spills > bound:
                found.append(f"{where}: {kernel.spills} bytes spilled, allowed {bound}")
            found += [f"{where}: no {wish} in its loops" for wish in missing(key, kernel)]
    return found


def table(rows: Rows, source: str, archs: list[str], column: str) -> str:
    lines = [f"| {column} | " + " | ".join(f"sm_{arch}" for arch in archs) + " |"]
    lines.append("| --- |" + " ---: |" * len(archs))
    for key, cells in rows.items():
        if key[0] == source:
            texts = [
                cells[arch].resources() if column == "kernel" else cells[arch].counts() for arch in archs
            ]
            lines.append("| " + " | ".join([f"`{key[1]}`", *texts]) + " |")
    return "\n".join(lines)


def markdown(rows: Rows, archs: list[str]) -> str:
    """The whole file."""
    parts = [
        "# CUDA C++ kernels: registers, spills, instructions",
        f"Made by `make ptxas` with {compiler_version()}, without a GPU. In the first table of a source a cell is "
        "registers a thread / bytes a thread spills, stored and loaded / bytes of stack / bytes of static shared memory "
        "(dynamic shared memory is asked for at launch and unknown here). The second counts "
        f"{', '.join(COUNTED)} in the loops of the machine code, unrolled as they stand: HMMA multiplies in "
        "tensor cores, LDGSTS and UBLKCP copy to shared memory in the background, LDSM is ldmatrix.",
        "No kernel spills unless its section says so.",
    ]
    for source in dict.fromkeys(key[0] for key in rows):
        parts.append(f"## {source}")
        bound, reason = SPILLS.get(source, (0, ""))
        wishes = ", ".join(EXPECTED.get(source, ())) or "none"
        parts.append(
            f"Instructions that every kernel must have in a loop: {wishes}."
            + (f" Spilled bytes allowed: {bound} ({reason})." if bound else "")
        )
        parts.append(table(rows, source, archs, "kernel"))
        if any(kernel.instructions for key in rows if key[0] == source for kernel in rows[key].values()):
            parts.append(table(rows, source, archs, "instructions"))
    return "\n\n".join(parts) + "\n"


def read(text: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """The cells of such a file, as text, by source, kind of table and kernel."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    source, column, archs = "", "", []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            source = line[3:]
        elif line.startswith(("| kernel", "| instructions")):
            column, archs = cells[0], [cell.removeprefix("sm_") for cell in cells[1:]]
        elif line.startswith("| `"):
            found[source, column, cells[0].strip("`")] = dict(zip(archs, cells[1:], strict=True))
    return found


def compile_all(names: list[str], archs: list[str], processes: int) -> Rows:
    tasks = [(path, arch) for path in sources() if path.stem in names for arch in archs]
    rows: Rows = {}
    start = time.perf_counter()
    with ThreadPoolExecutor(processes) as pool:
        for (path, arch), found in zip(
            tasks, pool.map(lambda task: compile_source(*task), tasks), strict=True
        ):
            seconds = time.perf_counter() - start
            print(
                f"{path.name}, sm_{arch}: {len(found)} kernels, at {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            for key, kernel in found.items():
                rows.setdefault(key, {})[arch] = kernel
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ptxas", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="OP,OP", help="these sources alone (needs --out)")
    parser.add_argument("--archs", metavar="80,90a", help="these architectures alone (needs --out)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ptxas.md")
    parser.add_argument(
        "--processes", type=int, default=2, help="compile with so many processes (default: 2)"
    )
    args = parser.parse_args(arguments)
    known = [path.stem for path in sources()]
    names = args.only.split(",") if args.only else known
    archs = args.archs.split(",") if args.archs else list(ARCHS)
    wrong = [name for name in names if name not in known] + [arch for arch in archs if arch not in ARCHS]
    if wrong:
        parser.error(
            f"no such source or architecture: {', '.join(wrong)}; sources are {', '.join(known)}; architectures "
            f"{', '.join(ARCHS)}"
        )
    if (args.only or args.archs) and args.out is None:
        parser.error("a part would replace the whole file; name another by --out")
    rows = compile_all(names, archs, args.processes)
    out = args.out or ROOT / "benchmarks" / "results" / "ptxas.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markdown(rows, archs))
    print(f"wrote {out}")
    lines = red(rows)
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
