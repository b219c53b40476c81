"""The soak of ``make soak``, for a few seconds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("psutil")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "soak.py"


@pytest.mark.slow
def test_a_short_soak(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    assert soak.main(["--minutes", "5", "--chunks", "200", "--cases", "8"]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "chunks 200 of 200, mismatches 0" in said and "grown: nothing" in said
    assert re.search(r"drawn\ncases \d+, mismatches 0", said)
    for what in ("resident MiB", "threads", "file handles"):
        assert re.search(rf"{what} first \d+, last \d+", said)
