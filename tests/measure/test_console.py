"""What commands print and write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolvla_fast.measure.console import Console, check_writable, plain_table, write_json


def test_looking_at_a_path_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    check_writable(path, "--json")
    assert not path.exists()
    path.parent.mkdir(exist_ok=True)
    path.write_text("earlier figures")
    check_writable(path, "--json")
    assert path.read_text() == "earlier figures"


def test_json_has_text_where_a_number_is_not_finite(tmp_path: Path) -> None:
    found = {"a": float("nan"), "b": [1.5, (float("-inf"), 2)], "c": {"d": None, "e": "nan"}}
    write_json(tmp_path / "new" / "a.json", found)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    read = json.loads((tmp_path / "new" / "a.json").read_text(), parse_constant=refuse)
    assert read == {"a": "nan", "b": [1.5, ["-inf", 2]], "c": {"d": None, "e": "nan"}}


def test_plain_table_aligns_columns() -> None:
    text = plain_table("Title", ["name", "ms"], [["a", "1.5"], ["longer", "12"]])
    assert text.splitlines() == ["Title", "name     ms", "------  ---", "a       1.5", "longer   12"]


def test_tables_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    for rich in (None, False):
        Console(rich).table("T", ["a", "b"], [["x" * 60, 1], ["y", None]])
        assert "x" * 60 in capsys.readouterr().out
