"""The house: imports run one way between rooms, without circles, and files stay small enough to read in one go."""

from __future__ import annotations

import pytest
from support.structure import DOCUMENT, FILES, GRAPH, PACKAGE, imports, room, with_picture

MAX_FILES, MAX_LINES = 8, 350


@pytest.mark.parametrize("module", GRAPH)
def test_a_module_imports_from_its_own_room_and_those_behind_it(module: str) -> None:
    upward = sorted(each for each in GRAPH[module] if room(each) < room(module))
    assert not upward, f"{module} imports {', '.join(upward)}, which is read before it"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("def late():\n    from ..patch import patch", "patch"),
        ("import importlib\nimportlib.import_module('smolvla_fast.patching.rtc')", "patching.rtc"),
        ("import_module(f'{__package__}.triton.{name}')", "ops.triton"),
    ],
)
def test_an_import_is_found_wherever_it_hides(code: str, found: str) -> None:
    assert imports("ops.select", code, is_package=False) == {found}


def test_no_module_imports_itself_through_others() -> None:
    """Late imports inside functions count: a circle that they hide is a circle to whoever reads."""
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module not in done:
            for each in sorted(GRAPH[module]):
                visit(each, (*trail, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_a_newcomer_finds_few_files_at_the_root() -> None:
    found = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(found) <= MAX_FILES, f"{len(found)} files at the root: {found}"


@pytest.mark.parametrize("module", FILES)
def test_a_file_is_read_in_one_go(module: str) -> None:
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{FILES[module].name} has {lines} lines, accepted are {MAX_LINES}"


def test_the_picture_in_the_docs_is_of_these_imports() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_picture(text), "run `make architecture`"
