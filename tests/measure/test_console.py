"""What commands print and write."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolvla_fast.measure.console import Console, check_writable, plain_table


def test_looking_at_a_path_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    check_writable(path, "--json")
    assert not path.exists()
    path.parent.mkdir(exist_ok=True)
    path.write_text("earlier figures")
    check_writable(path, "--json")
    assert path.read_text() == "earlier figures"


def test_plain_table_aligns_columns() -> None:
    text = plain_table("Title", ["name", "ms"], [["a", "1.5"], ["longer", "12"]])
    assert text.splitlines() == ["Title", "name     ms", "------  ---", "a       1.5", "longer   12"]


def test_tables_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    for rich in (None, False):
        Console(rich).table("T", ["a", "b"], [["x" * 60, 1], ["y", None]])
        assert "x" * 60 in capsys.readouterr().out
