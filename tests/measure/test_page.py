"""A report as one page: nothing of it is elsewhere, and nobody's text becomes a tag."""

from __future__ import annotations

import base64
import re
import sys
from html import unescape
from pathlib import Path

import pytest

from smolvla_fast.measure.page import escape_markdown, picture, table, write_page


@pytest.mark.parametrize("name", ["a b.png", "12:30 & 5 %.png", "data:x.png", "ä<(1)>.png", "a&amp;b.png"])
def test_a_page_has_its_pictures_inside(tmp_path: Path, name: str) -> None:
    pytest.importorskip("markdown_it")
    report, path, other = tmp_path / "12:30 & on.md", tmp_path / name, tmp_path / "secret.png"
    path.write_bytes(b"\x89PNG of some bytes")
    other.write_bytes(b"\x89PNG that the report did not write")
    report.write_text(
        f"# The <title>\n\n{picture('times', name)}\n\n![not ours](secret.png) ![gone](http://x/y.png)\n",
        encoding="utf-8",
    )
    page = write_page(report, [path])
    assert page == tmp_path / "12:30 & on.html"
    text = page.read_text(encoding="utf-8")
    assert f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="times"' in text
    assert text.count("<img") == text.count("src=") == 1 and "not ours" in text and "http" not in text
    assert "<title>The &lt;title&gt;</title>" in text


NAMES = [
    "<script>alert(1)</script>", "![x](secret.png)", "[a](http://b)", "<http://b>", "a|b", "*a*", "_a_", "__a__", "`a`",
    "joint_4.pos", "a\\", "&lt;", "# a", "- a", "1. a", "~~a~~", "a\n\n# b", "&amp;", "a_b_c", "*", "+ x", "= x",
]  # fmt: skip


def test_a_name_is_shown_as_it_is(tmp_path: Path) -> None:
    """Names of joints, cameras and episodes are somebody else's."""
    pytest.importorskip("markdown_it")
    (tmp_path / "secret.png").write_bytes(b"\x89PNG")
    report, escaped = tmp_path / "a.md", [escape_markdown(name) for name in NAMES]
    cells = table(["name", "p99"], [[name, 1] for name in escaped], 1)
    report.write_text(
        cells + "\n\n" + "\n".join(f"- {name}" for name in escaped) + f"\n\n**{' '.join(escaped)}**\n"
    )
    page = write_page(report, [])
    assert page is not None
    body = page.read_text(encoding="utf-8").partition("</style>")[2]
    shown = [" ".join(name.split()) for name in NAMES]
    for tag in ("td", "li"):
        found = re.findall(rf"<{tag}(?: [^>]*)?>(.*?)</{tag}>", body)
        assert [unescape(each) for each in found if each != "1"] == shown
    assert unescape(re.findall(r"<strong>(.*)</strong>", body)[0]) == " ".join(shown)
    assert escape_markdown("joint_4.pos: 3.2 %") == "joint_4.pos: 3.2 %", "no marks where none is needed"


def test_no_page_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    (tmp_path / "a.md").write_text("# a\n")
    assert write_page(tmp_path / "a.md", []) is None and not (tmp_path / "a.html").exists()
