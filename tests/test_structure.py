"""The house: imports run one way between rooms, without circles, and files stay small enough to read in one go."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "smolvla_fast"

ROOMS = (
    ("cli",),
    ("training", "train"),
    ("__init__", "auto_patch", "patch", "verify"),
    ("testing",),
    ("patching",),
    ("inference", "loss"),
    ("stages",),
    ("engine",),
    ("ops",),
    ("ops.cuda", "ops.triton"),
    ("ops.cpu",),
    ("ops.torch",),
    ("kernels",),
    ("model", "smolvla", "measure"),
    ("ops.extension", "ops.memory", "ops.processor", "ops.reference"),
)
"""From what is read first to what all else stands on. A file imports from its own room and from those behind it."""

MOST_FILES, MOST_LINES = 8, 350


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
        for place, names in enumerate(ROOMS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert fits, f"{module} stands in no room: give it one in ROOMS, or put it where it belongs"
    return max(fits)[1]


GRAPH = {name: imports(name, path) for name, path in FILES.items()}


@pytest.mark.parametrize("module", GRAPH)
def test_a_module_imports_from_its_own_room_and_those_behind_it(module: str) -> None:
    upward = sorted(each for each in GRAPH[module] if room(each) < room(module) and each != "__init__")
    assert not upward, f"{module} imports {', '.join(upward)}, which is read before it"


def test_no_module_imports_itself_through_others() -> None:
    """Late imports inside functions count: a circle that they hide is a circle to whoever reads."""
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module not in done:
            for each in sorted(GRAPH[module] - {"__init__"}):
                visit(each, (*trail, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_a_newcomer_finds_few_files_at_the_root() -> None:
    found = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(found) <= MOST_FILES, f"{len(found)} files at the root: {found}"


@pytest.mark.parametrize("module", FILES)
def test_a_file_is_read_in_one_go(module: str) -> None:
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= MOST_LINES, f"{FILES[module].name} has {lines} lines, accepted are {MOST_LINES}"
