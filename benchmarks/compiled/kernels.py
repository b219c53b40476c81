"""What ptxas says of a kernel, and the Markdown files that hold it: read from its log, written, and read back."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.report.tables import NONE, table

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


# Functions that were not inlined have their own properties; a kernel's come first.
ENTRY = re.compile(
    r"(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?", re.DOTALL,
)  # fmt: skip


def parse_log(log: str) -> dict[str, Kernel]:
    """By mangled name, what ``-Xptxas -v`` says of each kernel."""
    found = {}
    for text in log.split("Compiling entry function '")[1:]:
        if not (said := ENTRY.match(text)):
            raise RuntimeError(f"ptxas says nothing of a kernel; its log:\n{text[:1000]}")
        stack, stores, loads, registers, shared = (int(each or 0) for each in said.groups()[1:])
        found[said[1]] = Kernel(registers, stores + loads, shared, stack)
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
                wrong = kind.beyond(key[0], target, cell)
                wrong += [f"{cell.spills} bytes spilled, allowed {bound}"] if cell.spills > bound else []
            found += [f"{', '.join(key)}, sm_{target}: {each}" for each in wrong]
    return found


def markdown(kind: Any, rows: Rows, targets: Sequence[str]) -> str:
    """The whole file: a section for each op or source, with each of the kind's tables that has something to say."""

    def cell(value: Any, text: Callable[[Kernel], str]) -> str:
        return NONE if value is None else "does not compile" if isinstance(value, str) else text(value)

    parts = [kind.about()]
    for name in dict.fromkeys(key[0] for key in rows):
        bound, reason = kind.SPILLS.get(name, (0, ""))
        wishes = ", ".join(kind.EXPECTED.get(name, ())) or "none"
        asked = f"Instructions that every kernel must have in a loop: {wishes}. " if kind.EXPECTED else ""
        parts += [f"## {name}", f"{asked}Spilled bytes allowed: {bound}{reason and f' ({reason})'}."]
        for labels, text in kind.TABLES.items():
            names = labels.split(", ")
            own = [(key[1:], cells) for key, cells in rows.items() if key[0] == name]
            lines = [[*key, *(cell(cells.get(t), text) for t in targets)] for key, cells in own]
            if any(value != NONE for line in lines for value in line[len(names) :]):
                parts.append(table([*names, *(f"sm_{t}" for t in targets)], lines, left=len(names)))
    return "\n\n".join(parts) + "\n"
