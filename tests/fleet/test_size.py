"""The feature is small: Ray Serve does the rest."""

from __future__ import annotations

import ast
import io
import tokenize

from support.structure import FILES

MOST = 500
"""Lines of code that the issue of the feature allows."""
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(text: str) -> list[str]:
    """The lines of a file that are neither blank, comments nor docstrings."""
    tokens = [
        each for each in tokenize.generate_tokens(io.StringIO(text).readline) if each.type not in LAYOUT
    ]
    found = {line for each in tokens for line in range(each.start[0], each.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(
            node.value, ast.Constant
        ):  # a docstring, or one of a constant
            found -= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return [line for number, line in enumerate(text.splitlines(), 1) if number in found]


def test_the_feature_has_at_most_500_lines_of_code() -> None:
    """Files of the feature count whole, of others each line that names it."""
    counted = {}
    for name, path in FILES.items():
        lines = code_lines(path.read_text(encoding="utf-8"))
        counted[name] = len(lines) if "fleet" in name else sum("fleet" in line for line in lines)
    assert counted["fleet.front"] > 100 and counted["cli.serve_fleet"] and counted["cli.serve"]
    total = sum(counted.values())
    assert total <= MOST, f"{total} lines: { ({name: count for name, count in counted.items() if count}) }"
