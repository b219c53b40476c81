"""Reports for people: Markdown tables, and a Markdown report as one HTML page with its pictures inside."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

NO_PAGE = 'no HTML page: markdown-it-py is not installed; run `pip install "smolvla_fast[cli]"`'
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; }}
th {{ border-bottom: 2px solid #888; }}
img {{ max-width: 100%; }}
code {{ background: #f3f3f3; padding: 0 0.2rem; }}
</style>
{body}
</html>
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], left: int | None = None) -> str:
    """Markdown. left  how many columns hold text; None: all are aligned as such"""
    rule = ["---" if left is None or place < left else "---:" for place in range(len(columns))]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (columns, rule, *rows))


def escape_markdown(text: str) -> str:
    """Text of somebody else's, such as a joint's name, in one line of Markdown: shown as it is, tags and links too."""
    text = re.sub(
        r"([\\`*\[\]<>|&~$])|(?<![^\W_])_|_(?![^\W_])", lambda found: "\\" + found[0], " ".join(text.split())
    )
    return re.sub(r"^(\d*)([-+#=.)])", r"\1\\\2", text)


def picture(title: str, name: str) -> str:
    """Markdown for a picture in the report's folder, whatever the name of its file."""
    return f"![{title}]({quote(name, safe='')})"


def write_page(report: Path, pictures: Sequence[Path]) -> Path | None:
    """Writes the Markdown file ``report`` as HTML beside it, with ``pictures`` of the same folder inside the page.

    Any other picture that the text names is left out. None where markdown-it-py is not installed.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        return None
    text = report.read_text(encoding="utf-8")
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    inside = {path.name: base64.b64encode(path.read_bytes()).decode() for path in pictures}

    def image(_: Any, tokens: Sequence[Any], index: int, *rest: Any) -> str:
        name, title = unquote(tokens[index].attrs["src"]), escape(tokens[index].content)
        return f'<img src="data:image/png;base64,{inside[name]}" alt="{title}">' if name in inside else title

    markdown.add_render_rule("image", image)
    title = next(
        (line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")), report.stem
    )
    path = report.with_suffix(".html")
    path.write_text(PAGE.format(title=escape(title), body=markdown.render(text)), encoding="utf-8")
    return path
