"""The package as rooms and imports: what tests/test_structure.py holds, and the picture in docs/architecture.md.

``python tests/support/structure.py`` draws the picture anew (``make architecture``).
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "smolvla_fast"
DOCUMENT = ROOT / "docs" / "architecture.md"

ROOMS = {
    "cli": ("cli",),
    "train": ("training", "train"),
    "patch, verify": ("__init__", "auto_patch", "patch", "verify"),
    "testing": ("testing",),
    "patching": ("patching",),
    "inference, layers, loss": ("inference", "layers", "loss"),
    "stages": ("stages",),
    "engine": ("engine",),
    "ops": ("ops",),
    "ops/cuda": ("ops.cuda",),
    "ops/triton": ("ops.triton",),
    "ops/cpu": ("ops.cpu",),
    "ops/torch": ("ops.torch",),
    "kernels": ("kernels",),
    "model": ("model",),
    "smolvla": ("smolvla",),
    "measure": ("measure",),
    "ops/reference": ("ops.reference", "ops.extension", "ops.memory", "ops.processor"),
}
"""Rooms from what is read first to what all else stands on. A file imports from its own room and from those behind it."""

SAID = {
    "cli": "one file a command",
    "train": "a training run",
    "patch, verify": "the public verbs",
    "testing": "policies and data made offline",
    "patching": "the state beside a live policy",
    "inference, layers, loss": "a chunk, one layer, a loss",
    "stages": "observation, vision, prefix, denoise",
    "engine": "CUDA graphs, quantised weights",
    "ops": "every op, and who serves it",
    "ops/cuda": "CUDA C++",
    "ops/triton": "Triton",
    "ops/cpu": "C++ for CPUs",
    "ops/torch": "torch's own calls",
    "kernels": "Triton kernels",
    "model": "typed views of a live SmolVLA",
    "smolvla": "SmolVLA in plain PyTorch",
    "measure": "rounds, machine facts, charts",
    "ops/reference": "the truth of every op",
}


def files() -> dict[str, Path]:
    """Every module of the package by its name inside it; ``kernels/`` is ``kernels`` there."""
    found = {}
    for folder, start in ((PACKAGE, ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*start, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


FILES = files()


def imports(name: str, path: Path) -> set[str]:
    """Modules of the package that a module imports, inside functions and for type checkers too."""
    package = [] if name == "__init__" else name.split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["smolvla_fast", *package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            names = [".".join([*base, each.name]) for each in node.names]
        for full in names:
            if full.split(".")[0] != "smolvla_fast":
                continue
            inside = full.removeprefix("smolvla_fast").removeprefix(".")
            # The longest beginning that is a module: what comes behind it is a name in that module.
            while inside and inside not in FILES:
                inside = inside.rpartition(".")[0]
            found.add(inside or "__init__")
    return found - {name}


def room(module: str) -> int:
    """Where a module stands in ROOMS, by the longest of their names that it begins with."""
    fits = [
        (len(name), place)
        for place, names in enumerate(ROOMS.values())
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert fits, f"{module} stands in no room: give it one in ROOMS, or put it where it belongs"
    return max(fits)[1]


GRAPH = {name: imports(name, path) for name, path in FILES.items()}


def mermaid() -> str:
    """Rooms and their imports as a Mermaid chart, without the arrows that a longer way already draws."""
    names = list(ROOMS)
    edges = {(room(a), room(b)) for a, found in GRAPH.items() for b in found if b != "__init__"}
    below: dict[int, set[int]] = {place: set() for place in range(len(names))}
    for place in reversed(below):
        for other in sorted(b for a, b in edges if a == place and b != place):
            below[place] |= {other} | below[other]
    drawn = [
        (a, b)
        for a, b in sorted(edges)
        if a != b and not any((a, c) in edges and b in below[c] for c in below if c not in (a, b))
    ]
    boxes = [f'    r{i}["<b>{name}</b><br/>{SAID[name]}"]' for i, name in enumerate(names)]
    return "\n".join(["```mermaid", "flowchart TD", *boxes, *(f"    r{a} --> r{b}" for a, b in drawn), "```"])


def with_picture(text: str) -> str:
    """A document with its Mermaid chart drawn anew."""
    before, _, rest = text.partition("```mermaid")
    return before + mermaid() + rest.partition("\n```")[2]


if __name__ == "__main__":
    DOCUMENT.write_text(with_picture(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"drew the rooms in {DOCUMENT.relative_to(ROOT)}")
