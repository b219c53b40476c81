"""Reads PTX as Triton's compiler writes it, into a program of the machine (machine.h).

What the machine does not know is an error that names kernel, line and instruction.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from simt.emulator import build

SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
"""Registers that the machine fills: the first of the file r."""
FILES = {"pred": "p", "b16": "r", "b32": "r", "b64": "d"}


class Unknown(Exception):
    """An instruction, or a form of one, that the machine does not know."""


@dataclass
class Parameter:
    """One parameter of a kernel: its type, such as "u64", and the register that holds it."""

    kind: str
    file: str
    index: int


@dataclass
class Program:
    """assembled  what the machine runs      threads  of a block      parameters  in order"""

    name: str
    assembled: Any
    threads: int
    parameters: list[Parameter]


@dataclass
class _Reader:
    name: str
    machine: Any
    sizes: dict[str, int] = field(default_factory=lambda: {"r": len(SPECIAL), "d": 0, "p": 0})
    registers: dict[str, tuple[str, int]] = field(default_factory=dict)
    constants: dict[tuple[str, int], int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    rows: list[Any] = field(default_factory=list)
    source: str = ""
    line: int = 0
    text: str = ""

    def unknown(self, what: str) -> Unknown:
        return Unknown(f"{self.name}, line {self.line}: {what}: {self.text}")

    def take(self, file: str) -> int:
        self.sizes[file] += 1
        return self.sizes[file] - 1

    def constant(self, file: str, value: int) -> int:
        key = (file, value & (1 << 64) - 1)
        if key not in self.constants:
            self.constants[key] = self.take(file)
        return self.constants[key]

    def register(self, file: str, text: str) -> int:
        """Of an operand that has to be in this file: a register, a number, or the start of shared memory."""
        if text in SPECIAL:
            found = ("r", SPECIAL.index(text))
        elif text.startswith("%"):
            if text not in self.registers:
                raise self.unknown(f"no register {text}")
            found = self.registers[text]
        elif text == "_":  # a half of a pair that nobody wants
            found = (file, self.take(file))
        elif text == "global_smem":
            found = (file, self.constant(file, 0))
        else:
            found = (file, self.constant(file, number(text)))
        if found[0] != file:
            raise self.unknown(f"{text} is a register of another size")
        return found[1]

    def emit(self, opcode: str, operands: list[str], guard: str | None) -> None:
        wanted = self.machine.operands(opcode)
        if wanted is None:
            raise self.unknown(f"unknown instruction {opcode}")
        wanted = wanted.removesuffix("W")
        if len(wanted) != len(operands):
            raise self.unknown(f"{len(operands)} operands, not {len(wanted)}")
        registers: list[int] = []
        numbers: list[Any] = []
        for i, (kind, text) in enumerate(zip(wanted, operands, strict=True)):
            # Of a wider source the low half counts, and only an instruction that narrows has one.
            narrows = opcode.startswith(("cvt.", "st.", "shl.", "shr."))
            if narrows and i and kind == "r" and self.registers.get(text, "r")[0] == "d":
                narrow = f"{text} low {len(self.rows)} {i}"
                self.registers[narrow] = ("r", self.take("r"))
                self.emit("cvt.u32.u64", [narrow, text], None)
                text = narrow
            if kind in "rdp":
                registers.append(self.register(kind, text))
            elif kind in "aA":
                base, offset = address(text)
                registers.append(self.register("r" if kind == "a" else "d", base))
                numbers.append(offset)
            else:
                numbers.append(text if kind == "l" else number(text))
        negated = bool(guard) and guard[0] == "!"
        condition = -1 if guard is None else self.register("p", guard.lstrip("!"))
        place = f"line {self.line} ({self.source}): {self.text}"
        self.rows.append((opcode, registers, numbers, condition, negated, self.line, place))


def number(text: str) -> int:
    """The bits of a number: 12, -1, 0x3340U, 0f3F800000, 0d3FE0000000000000."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0)


def address(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
    if found is None:
        raise ValueError(text)
    return found[1], int(found[2] or "0", 0)


def split(text: str) -> list[str]:
    """Operands at commas outside brackets; those of a vector one by one."""
    found = re.findall(r"\[[^\]]*\]|[^,{}\s][^,{}]*", text)
    return [each.strip() for each in found if each.strip()]


def statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, statement) of the body of the kernel, labels and directives too."""
    depth = 0  # an inline assembly may be a block of its own
    for line, raw in enumerate(text.splitlines(), 1):
        stripped = raw.partition("//")[0].strip()
        outside = depth == 0
        depth += stripped.count("{") - stripped.count("}")
        if outside:
            continue
        if depth == 0:
            return
        for each in filter(None, (part.strip() for part in stripped.split(";"))):
            yield line, each


@cache
def read(text: str) -> Program:
    """The program of a PTX module with one kernel; kept by its text.

    raises  ``Unknown``
    """
    machine = build.ptx()
    entry = re.search(r"\.visible \.entry (\S+)\(", text)
    threads = re.search(r"\.reqntid (\d+)", text)
    if entry is None or threads is None:
        raise Unknown("no kernel with .reqntid in this module")
    reader = _Reader(entry[1], machine)
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]*)"', text, re.MULTILINE))
    for kind, name in re.findall(r"\.param \.(\w+) .*?(\w+_param_\d+)", text):
        file = "d" if kind.endswith("64") else "r"
        reader.parameters[name] = Parameter(kind, file, reader.take(file))
    for reader.line, statement in statements(text):
        reader.text = statement
        try:
            _statement(reader, statement, files)
        except (KeyError, ValueError) as error:  # a symbol, a type, a form of an address
            raise reader.unknown(f"unknown {error}") from None
    rows = [
        (*row[:2], [reader.labels[n] if isinstance(n, str) else signed(n) for n in row[2]], *row[3:])
        for row in reader.rows
    ]
    values = [(file, index, value) for (file, value), index in reader.constants.items()]
    sizes = reader.sizes
    assembled = machine.assemble(reader.name, rows, values, sizes["r"], sizes["d"], sizes["p"])
    return Program(reader.name, assembled, int(threads[1]), list(reader.parameters.values()))


def _statement(reader: _Reader, statement: str, files: dict[str, str]) -> None:
    if statement.startswith("."):
        _directive(reader, statement, files)
    elif statement.endswith(":"):
        reader.labels[statement[:-1]] = len(reader.rows)
    elif statement.strip("{} "):
        _instruction(reader, statement.strip("{} ") if statement[0] == "{" else statement)


def signed(value: int) -> int:
    return struct.unpack("<q", struct.pack("<Q", value & (1 << 64) - 1))[0]


def _directive(reader: _Reader, statement: str, files: dict[str, str]) -> None:
    words = statement.split()
    if words[0] == ".reg":
        for name, count in re.findall(r"(%\w+?)(?:<(\d+)>)?(?:,|$)", "".join(words[2:])):
            file = FILES[words[1][1:]]
            for each in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                reader.registers[each] = (file, reader.take(file))
    elif words[0] == ".loc":
        reader.source = f"{files.get(words[1], '?').rpartition('/')[2]}:{words[2]}"
    elif words[0] not in (".pragma",):
        raise reader.unknown("unknown directive")


def _instruction(reader: _Reader, statement: str) -> None:
    found = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if found is None:
        raise reader.unknown("not an instruction")
    guard, opcode, rest = found.groups()
    operands = split(rest)
    if opcode.startswith("ld.param."):
        # A parameter is a register here; what is narrower than where it goes is widened by its own sign.
        name, offset = address(operands[1])
        if offset:
            raise reader.unknown("a part of a parameter")
        parameter, source = reader.parameters[name], f"%{name}"
        reader.registers[source] = (parameter.file, parameter.index)
        to = reader.registers[operands[0]][0]
        if to == parameter.file:
            opcode = "mov.b32" if to == "r" else "mov.b64"
        else:
            opcode = {"s32": "cvt.s64.s32", "u32": "cvt.u64.u32", "b32": "cvt.u64.u32"}[
                opcode.rpartition(".")[2]
            ]
        operands = [operands[0], source]
    elif opcode in ("mov.b32", "mov.b64") and "{" in rest:
        opcode += " unpack" if rest.startswith("{") else " pack"
    elif opcode.startswith("cp.async.c") and len(operands) == 3 and "commit" not in opcode:
        opcode += " whole"
    elif opcode.startswith("wgmma.mma_async"):
        operands, opcode = _wgmma(operands, opcode)
    reader.emit(opcode, operands, guard)


def _wgmma(operands: list[str], opcode: str) -> tuple[list[str], str]:
    accumulators = int(opcode.partition("m64n")[2].partition("k")[0]) // 2
    # Fragments of four registers, or a descriptor; two numbers more where operands may lie transposed.
    count = len(operands) - accumulators - (0 if "tf32" in opcode else 2)
    return operands, opcode + (" ss" if count == 5 else " rs")
