"""The package as rooms and imports: what tests/test_structure.py holds, and the picture in docs/architecture.md.

``python tests/support/structure.py`` draws the picture anew (``make architecture``).
"""

from __future__ import annotations

import ast
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "smolvla_fast"
DOCUMENT = ROOT / "docs" / "architecture.md"

ROOMS = {
    "cli": ("cli",),
    "fleet": ("fleet",),
    "train": ("training", "train"),
    "patch, verify": ("__init__", "auto_patch", "patch", "verify"),
    "testing": ("testing",),
    "patching": ("patching",),
    "tune": ("tune",),
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
    "ops/reference": ("ops.reference", "ops.extension", "ops.memory", "ops.next_norm", "ops.processor"),
}
"""Rooms from what is read first to what all else stands on. A file imports from its own room and from those behind it."""

SAID = {
    "cli": "one file a command",
    "fleet": "many robots on one policy, by Ray Serve",
    "train": "a training run",
    "patch, verify": "the public verbs",
    "testing": "policies and data made offline",
    "patching": "the state beside a live policy",
    "tune": "who computes an op fastest here",
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


CALLS = ("import_module", "__import__")


def files() -> dict[str, Path]:
    """Every module of the package by its name inside it; ``kernels/`` is ``kernels`` there."""
    found = {}
    for folder, start in ((PACKAGE, ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*start, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


FILES = files()


def imports(name: str, code: str, is_package: bool) -> set[str]:
    """Modules of the package that a module imports: at its head, inside functions, for type checkers, by name.

    The package's version is no import: whoever reads it needs nothing of what stands above.
    """
    module = "smolvla_fast" if name == "__init__" else f"smolvla_fast.{name}"
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith(CALLS):
            given = _beginning(node.args[0], {"__package__": package, "__name__": module})
            names = [resolve_name(given, package).rstrip(".")] if given else []
        for full in names:
            if full.split(".")[0] != "smolvla_fast" or full == "smolvla_fast.__version__":
                continue
            inside = full.removeprefix("smolvla_fast").removeprefix(".")
            # The longest beginning that is a module: what comes behind it is a name in that module.
            while inside and inside not in FILES:
                inside = inside.rpartition(".")[0]
            found.add(inside or "__init__")
    return found - {name}


def _beginning(argument: ast.expr, known: dict[str, str]) -> str:
    """What is known of a module's name that is given as text: up to the first part that a run decides."""
    text = ""
    for part in argument.values if isinstance(argument, ast.JoinedStr) else [argument]:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue) and ast.unparse(part.value) in known:
            text += known[ast.unparse(part.value)]
        else:
            break
    return text


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


GRAPH = {name: imports(name, path.read_text(), path.name == "__init__.py") for name, path in FILES.items()}


def mermaid() -> str:
    """Rooms and their imports as a Mermaid chart, without the arrows that a longer way already draws."""
    names = list(ROOMS)
    edges = {(room(a), room(b)) for a, found in GRAPH.items() for b in found}
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
