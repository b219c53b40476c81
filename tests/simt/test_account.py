"""docs/denoise-persistent.md has the tables that `make loop-account` prints, to the last figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simt.account import account

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_the_account_is_what_its_script_prints(compiled: Any) -> None:
    """Its plan of shared memory is the launcher's own, so a changed plan is red here until the page says so."""
    rows = [line for line in account().splitlines() if line.startswith("| ")]
    page = (ROOT / "docs" / "denoise-persistent.md").read_text().splitlines()
    assert len(rows) > 20 and [row for row in rows if row not in page] == []
