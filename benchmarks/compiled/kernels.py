"""What ptxas says of a kernel, and the Markdown files that hold it: read from its log, written, and read back."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report.tables import NONE, table

ROOT = Path(__file__).resolve().parents[2]
KIB = 1024


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one target.

    spills  bytes that a thread stores and loads      stack  bytes of a thread      shared  bytes of a block
    tensor  columns of tensor memory      serialized  whether ptxas serialized wgmma instructions
    instructions  how often each counted one stands in a loop
    """

    registers: int
    spills: int = 0
    shared: int = 0
    stack: int = 0
    tensor: int = 0
    serialized: bool = False
    instructions: dict[str, int] = field(default_factory=dict)


Key = tuple[str, ...]
"""section of the file, then the labels of a row"""
Rows = dict[Key, dict[str, Kernel | str]]
"""By target; a text says why it does not compile."""


def own_cache(folder: str) -> None:
    """Of a process that compiles: ptxas speaks when it runs, so none may find what another compiled."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)


def parse_log(log: str) -> dict[str, Kernel]:
    """By mangled name, what ``-Xptxas -v`` says of each kernel."""
    found = {}
    for text in log.split("Compiling entry function '")[1:]:
        # Functions that were not inlined have their own properties; a kernel's come first.
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        used = re.search(r"Used (\d+) registers", text)
        if frame is None or used is None:
            raise RuntimeError(f"ptxas says nothing of a kernel; its log:\n{text[:1000]}")
        stack, stores, loads = map(int, frame.groups())
        shared = re.search(r"(\d+) bytes smem", text)
        bytes_ = int(shared[1]) if shared else 0
        found[text.split("'", 1)[0]] = Kernel(int(used[1]), stores + loads, bytes_, stack)
    return found


def red(kind: Any, rows: Rows) -> list[str]:
    """A line for each cell that does not compile, spills more than its section may, or passes a limit of the kind.

    kind  the module ``aot`` or ``ptxas``
    """
    found = []
    for key, cells in rows.items():
        bound, _ = kind.SPILLS.get(key[0], (0, ""))
        for target, cell in cells.items():
            if isinstance(cell, str):
                wrong = [f"does not compile: {cell}"]
            else:
                wrong = [f"{cell.spills} bytes spilled, allowed {bound}"] if cell.spills > bound else []
                wrong += kind.beyond(key[0], target, cell)
            found += [f"{', '.join(key)}, sm_{target}: {each}" for each in wrong]
    return found


def markdown(kind: Any, rows: Rows, targets: Sequence[str]) -> str:
    """The whole file: a section for each op or source, with each of the kind's tables that has something to say."""

    def cell(value: Any, text: Callable[[Kernel], str]) -> str:
        return NONE if value is None else "does not compile" if isinstance(value, str) else text(value)

    parts = [kind.about()]
    for name in dict.fromkeys(key[0] for key in rows):
        parts += [f"## {name}", kind.allowed(name, *kind.SPILLS.get(name, (0, "")))]
        for labels, text in kind.TABLES.items():
            names = labels.split(", ")
            own = [(key[1:], cells) for key, cells in rows.items() if key[0] == name]
            lines = [[*key, *(cell(cells.get(t), text) for t in targets)] for key, cells in own]
            if any(value != NONE for line in lines for value in line[len(names) :]):
                parts.append(table([*names, *(f"sm_{t}" for t in targets)], lines, left=len(names)))
    return "\n\n".join(parts) + "\n"


def read(text: str) -> dict[Key, dict[str, str]]:
    """The cells of such a file, as text, by section, kind of table (its first column) and labels, and by target."""
    found: dict[Key, dict[str, str]] = {}
    name, left, header = "", 0, [""]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            name = line[3:]
        elif cells[-1].startswith("sm_"):
            header, left = cells, sum(not cell.startswith("sm_") for cell in cells)
        elif line.startswith("| ") and not line.startswith("| ---"):
            targets = (target.removeprefix("sm_") for target in header[left:])
            key = (name, header[0], *(label.strip("`") for label in cells[:left]))
            found[key] = dict(zip(targets, cells[left:], strict=True))
    return found
