"""Kernels compiled for a GPU that is not there: launchers run on CPU tensors, and a launch compiles and ends."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton

KIB = 1024


@dataclass(frozen=True)
class Cell:
    """One kernel compiled for one target. spills: bytes stored and loaded by a thread; shared, tensor: of a program."""

    registers: int
    spills: int
    shared: int
    tensor: int
    serialized: bool = False

    def text(self) -> str:
        found = f"{self.registers} / {self.spills} / {self.shared / KIB:.1f}"
        return found + (" *" if self.serialized else "")


Key = tuple[str, str, str, str]
"""op, kernel, case and call, dtypes"""
Rows = dict[Key, dict[int, Cell | str]]


class Target:
    """Stands for Triton's driver: there is a device, of this capability, and nothing is ever launched on it."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.capability = capability
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what is compiled for one target is cached apart from the others'

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, Cell]]]:
    """Inside, launching a kernel on CPU tensors compiles it for this capability; yields (kernel, Cell) of each launch."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from smolvla_fast.kernels.common import assume_capability

    launched: list[tuple[str, Cell]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        launched.append((self.__name__.removeprefix("_"), _cell(kernel, log.getvalue())))
        return kernel

    before, dump = driver._active, triton.knobs.nvidia.dump_ptxas_log
    driver.set_active(Target(capability))
    triton.knobs.nvidia.dump_ptxas_log = True
    JITFunction.run = compile_only
    try:
        with assume_capability(capability):
            yield launched
    finally:
        JITFunction.run = launch
        triton.knobs.nvidia.dump_ptxas_log = dump
        driver._active = before


_cells: dict[str, Cell] = {}


def _cell(kernel: Any, log: str) -> Cell:
    """From ptxas's log, which is there the first time alone, and from Triton's own notes."""
    if kernel.hash not in _cells:
        used = re.search(r"Used (\d+) registers", log)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        if used is None or spilled is None:
            raise RuntimeError(f"ptxas says nothing of {kernel.name}; its log:\n{log}")
        notes = kernel.metadata
        columns = getattr(notes, "tmem_size", 0) or 0
        _cells[kernel.hash] = Cell(
            int(used[1]), sum(map(int, spilled.groups())), notes.shared, columns, "serialized" in log
        )
    return _cells[kernel.hash]


def read(text: str) -> dict[Key, dict[int, str]]:
    """The cells of such a file, as text."""
    found: dict[Key, dict[int, str]] = {}
    op, targets = "", []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            op = line[3:]
        elif line.startswith("| kernel"):
            targets = [int(cell.removeprefix("sm_")) for cell in cells[3:]]
        elif line.startswith("| ") and not line.startswith("| ---"):
            kernel, where, dtypes = cells[:3]
            found[op, kernel, where, dtypes] = dict(zip(targets, cells[3:], strict=True))
    return found
