"""A report as one page: nothing of it is elsewhere, and nobody's text becomes a tag."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest

from smolvla_fast.measure.page import table, write_page


def test_a_page_has_its_pictures_inside(tmp_path: Path) -> None:
    pytest.importorskip("markdown_it")
    report, picture = tmp_path / "a b.md", b"\x89PNG of some bytes"
    (tmp_path / "a b-x.png").write_bytes(picture)
    rows = table(["joint", "p99"], [["<script>arm</script>", 1], ["x", 2]], 1)
    report.write_text(f"# The <title>\n\n{rows}\n\n![times](<a b-x.png>)\n\n![gone](gone.png)\n")
    page = write_page(report)
    assert page == tmp_path / "a b.html"
    text = page.read_text()
    assert f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"' in text
    assert 'src="gone.png"' in text and text.count("<td") == 4
    assert (
        "<script>" not in text and "&lt;script&gt;arm" in text and "<title>The &lt;title&gt;</title>" in text
    )


def test_no_page_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    (tmp_path / "a.md").write_text("# a\n")
    assert write_page(tmp_path / "a.md") is None and not (tmp_path / "a.html").exists()
